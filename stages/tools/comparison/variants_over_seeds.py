"""The variants in the cells of a comparison -> a table with a row for each form of a model, over the seeds."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stages.protocol.costs import Cost
from stages.protocol.evaluation import DENSE, FID_DENSE, Metric
from stages.protocol.intervals import Estimate, estimate
from stages.protocol.variants import MEASURED
from stages.report.markdown import rows_to_markdown
from stages.report.table import ALIKE, setting_to_text, write_size
from stages.tools.comparison.cells import FinishedCell, in_row
from stages.tools.comparison.estimates import (
    difference_by_seed,
    estimate_time,
    write_difference,
    write_estimate,
    write_speed_up_over_seeds,
)
from stages.tools.comparison.methods import DENSE_TITLE, ONE_SHOT, RESULT

Metrics = Mapping[str, Metric]


@dataclass(frozen=True)
class VariantOfMethod:
    """One form of a method's model, once for each seed."""

    title: str
    """Such as ours + int8."""
    size_bytes: int
    """Size of its weights or graph."""
    metrics: Mapping[int, Metrics]
    """Seed -> its metrics."""
    model: Mapping[int, Metrics]
    """Seed -> the metrics of the model that it was made from."""
    costs: Sequence[Cost]
    """Time of a pass of each seed at the first batch size; empty unless all seeds have times."""

    def estimate(self, metric: str) -> Estimate:
        """Estimate a metric's mean over the seeds."""
        return estimate([found[metric].mean for found in self.metrics.values()])

    def difference(self, metric: str) -> Estimate | None:
        """Estimate metric(variant) − metric(its model), paired by seed; None if the models lack the metric."""
        ours, theirs = (
            {seed: found[metric].mean for seed, found in metrics.items() if metric in found}
            for metrics in (self.metrics, self.model)
        )
        return difference_by_seed(ours, theirs)


def variants_over_seeds(cells: Sequence[FinishedCell], titles: Mapping[str, str]) -> list[VariantOfMethod]:
    """Sort the variants into forms and seeds: those of the dense model, then those of each row.

    Args:
        cells: The cells of a comparison.
        titles: Row -> title, in the order of the table.
    """
    return variants_of_groups({title: in_row(cells, row) for row, title in titles.items()})


def variants_of_groups(groups: Mapping[str, Sequence[FinishedCell]]) -> list[VariantOfMethod]:
    """Sort the variants of groups of cells, each with one cell a seed: those of the dense model, then of each group.

    Args:
        groups: Title -> cells; those without variants are left out.
    """
    by_seed = {title: {cell.seed: cell for cell in group if cell.variants} for title, group in groups.items()}
    everywhere = {seed: cell for own in by_seed.values() for seed, cell in own.items()}
    dense: dict[str, VariantOfMethod] = {}
    for own in (everywhere, *by_seed.values()):  # groups differ in it only if they ask for other variants
        for variant in _made_of(DENSE_TITLE, DENSE, own):
            dense.setdefault(variant.title, variant)
    found = list(dense.values())
    for title, own in by_seed.items():
        found += _made_of(f"{title}, not finetuned", ONE_SHOT, own)
        found += _made_of(title, RESULT, own)
    return found


def _made_of(title: str, model: str, cells: Mapping[int, FinishedCell]) -> Iterator[VariantOfMethod]:
    """Yield each form of one model; all seeds of a comparison have the same ones."""
    by_seed = {
        seed: {it.kind.name: it for it in cell.variants.variants.values() if it.model == model}
        for seed, cell in cells.items()
        if cell.variants
    }
    for name, first in next(iter(by_seed.values()), {}).items():
        having = [seed for seed, variants in by_seed.items() if name in variants]
        timed = [cells[seed].variant_costs for seed in having]
        yield VariantOfMethod(
            f"{title} + {first.kind.title}",
            first.size_bytes,
            {seed: by_seed[seed][name].metrics for seed in having},
            {seed: cells[seed].record.models[model].metrics() for seed in having},
            [times.first(f"{model}+{name}") for times in timed if times] if all(timed) else [],
        )


def variants_to_parts(variants: Sequence[VariantOfMethod]) -> list[str]:
    """Write heading, table and explanation as Markdown; nothing without variants."""
    if not variants:
        return []
    rows = variants_to_rows(variants)
    note = (
        f"Under the protocol of the rows above, from the same noise. Differences are from the model that a variant was "
        f"made of, paired by seed; {ALIKE} marks those whose interval contains zero.{_explain_speed_up(variants)}"
    )
    return ["## Variants", rows_to_markdown(rows), note]


def _explain_speed_up(variants: Sequence[VariantOfMethod]) -> str:
    """Describe the setting of the speed-up; nothing where none is shown."""
    settings = {setting_to_text(cost) for it in variants for cost in it.costs}
    if not settings:
        return ""
    return f" Speed-up: relative to the dense model, passes timed in turn, {'; '.join(sorted(settings))}."


def variants_to_rows(variants: Sequence[VariantOfMethod]) -> list[dict[str, str]]:
    """Write the table's texts, one row per form: column -> text."""
    return [
        {
            "variant": it.title,
            "on disk": write_size(it.size_bytes),
            "FID": write_estimate(it.estimate("fid"), 3),
            "difference": write_difference(it.difference("fid"), 3),
            "FID to dense": write_estimate(it.estimate(FID_DENSE), 3),
            "FID to dense difference": write_difference(it.difference(FID_DENSE), 3),
            "KID × 10³": write_estimate(it.estimate("kid"), 2, factor=1e3),
            "SSIM": write_estimate(it.estimate("ssim"), 4),
            "SSIM difference": write_difference(it.difference("ssim"), 4),
            "speed-up": write_speed_up_over_seeds(it.costs) if it.costs else "–",
            "seeds": str(len(it.metrics)),
        }
        for it in variants
    ]


def variants_to_json(variants: Sequence[VariantOfMethod]) -> dict[str, Any]:
    """Make the part of method_table.json: title -> metric -> estimate, and the difference from its model."""
    return {
        it.title: {
            "size_bytes": it.size_bytes,
            **{name: asdict(it.estimate(name)) for name in MEASURED},
            **{f"{name}_difference": asdict(found) for name in MEASURED if (found := it.difference(name))},
            **({"speed_up": asdict(found)} if (found := estimate_time(it.costs, "speed_up")) else {}),
        }
        for it in variants
    }


def variants_to_numbers(cell: FinishedCell) -> dict[str, float | None]:
    """Return the columns of table.csv that the variants of a cell add."""
    variants = cell.variants.variants if cell.variants else {}
    numbers: dict[str, float | None] = {}
    for name, it in variants.items():
        numbers |= {f"{name}.{metric}": found.mean for metric, found in it.metrics.items()}
        if cell.variant_costs:
            numbers[f"{name}.speed_up"] = cell.variant_costs.first(name).speed_up
    return numbers
