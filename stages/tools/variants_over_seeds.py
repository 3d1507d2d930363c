"""The variants in the cells of a comparison -> a table with a row for each form of a model, over the seeds."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.protocol.evaluation import DENSE, FID_DENSE, Metric
from stages.protocol.intervals import Estimate, estimate
from stages.protocol.variants import MEASURED, VARIANTS_FILE, VariantsRecord, read_variants
from stages.report.markdown import rows_to_markdown
from stages.report.table import ALIKE, write_size
from stages.runtime.errors import InputError
from stages.tools.cells import FinishedCell, in_row
from stages.tools.estimates import difference_by_seed, write_difference, write_estimate
from stages.tools.methods import DENSE_TITLE, ONE_SHOT, RESULT

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


def read_variants_of_cells(folder: Path, cells: Iterable[FinishedCell]) -> dict[str, VariantsRecord]:
    """Read the variants of all cells below a folder: cell -> record; cells without variants are left out.

    Raises:
        InputError: A file is damaged, or variants were measured under another protocol than their models.
    """
    return {cell.name: found for cell in cells if (found := _read(folder, cell))}


def variants_over_seeds(
    cells: Sequence[FinishedCell], titles: Mapping[str, str], records: Mapping[str, VariantsRecord]
) -> list[VariantOfMethod]:
    """Sort the variants into forms and seeds: those of the dense model, then those of each row.

    Args:
        cells: The cells of a comparison.
        titles: Row -> title, in the order of the table.
        records: Cell -> its variants; cells without are left out.
    """
    groups = {title: in_row(cells, row) for row, title in titles.items()}
    return variants_of_groups(groups, records)


def variants_of_groups(
    groups: Mapping[str, Sequence[FinishedCell]], records: Mapping[str, VariantsRecord]
) -> list[VariantOfMethod]:
    """Sort the variants of groups of cells, each with one cell a seed: those of the dense model, then of each group.

    Args:
        groups: Title -> cells.
        records: Cell -> its variants; cells without are left out.
    """
    by_seed = {title: {cell.seed: cell for cell in group if cell.name in records} for title, group in groups.items()}
    everywhere = {seed: cell for own in by_seed.values() for seed, cell in own.items()}
    dense: dict[str, VariantOfMethod] = {}
    for own in (everywhere, *by_seed.values()):  # groups differ in it only if they ask for other variants
        for variant in _made_of(DENSE_TITLE, DENSE, own, records):
            dense.setdefault(variant.title, variant)
    found = list(dense.values())
    for title, own in by_seed.items():
        found += _made_of(f"{title}, not finetuned", ONE_SHOT, own, records)
        found += _made_of(title, RESULT, own, records)
    return found


def _read(folder: Path, cell: FinishedCell) -> VariantsRecord | None:
    """Read the variants of a cell; None where it has none."""
    if not (folder / cell.name / VARIANTS_FILE).is_file():
        return None
    record = read_variants(folder / cell.name)
    if record.variants and record.protocol_id != cell.record.protocol_id:
        found = f"{cell.name} has variants of protocol {record.protocol_id} and models of {cell.record.protocol_id}"
        raise InputError(f"{found}; remove its folder and run the flow again")
    return record if record.variants else None


def _made_of(
    title: str, model: str, cells: Mapping[int, FinishedCell], records: Mapping[str, VariantsRecord]
) -> Iterator[VariantOfMethod]:
    """Yield each form of one model; all seeds of a comparison have the same ones."""
    by_seed = {
        seed: {it.kind.name: it for it in records[cell.name].variants.values() if it.model == model}
        for seed, cell in cells.items()
    }
    for name, first in next(iter(by_seed.values()), {}).items():
        having = [seed for seed, variants in by_seed.items() if name in variants]
        yield VariantOfMethod(
            f"{title} + {first.kind.title}",
            first.size_bytes,
            {seed: by_seed[seed][name].metrics for seed in having},
            {seed: cells[seed].record.models[model].metrics() for seed in having},
        )


def variants_to_parts(variants: Sequence[VariantOfMethod]) -> list[str]:
    """Write heading, table and explanation as Markdown; nothing without variants."""
    if not variants:
        return []
    rows = variants_to_rows(variants)
    note = (
        f"Under the protocol of the rows above, from the same noise. Differences are from the model that a variant was "
        f"made of, paired by seed; {ALIKE} marks those whose interval contains zero."
    )
    return ["## Variants", rows_to_markdown(rows), note]


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
        }
        for it in variants
    }


def variants_to_numbers(record: VariantsRecord) -> dict[str, float]:
    """Return the columns of table.csv that the variants of a cell add."""
    return {
        f"{name}.{metric}": found.mean for name, it in record.variants.items() for metric, found in it.metrics.items()
    }
