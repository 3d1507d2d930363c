"""A comparison of pruning methods -> its table and plots, beside the numbers that the paper published."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes

from stages.protocol.evaluation import DENSE, FID_DENSE, METRICS
from stages.protocol.intervals import Estimate
from stages.protocol.verdict import Verdict, judge
from stages.report.figures import COLOURS, plain_log
from stages.report.legend import legend_above
from stages.report.markdown import rows_to_markdown
from stages.report.table import ALIKE, fid_dense_to_text, write_count, write_params
from stages.report.table_page import worst_level
from stages.tools.comparison.cells import FinishedCell
from stages.tools.comparison.estimates import ONE_SEED, protocols_to_text, write_difference, write_estimate
from stages.tools.comparison.methods import ONE_SHOT, Comparison, Method, read_comparison
from stages.tools.comparison.published import (
    BASELINE,
    METHODS,
    SIZE_TOLERANCE,
    PublishedRow,
    PublishedTable,
    read_published,
)
from stages.tools.comparison.table_files import Lead, write_table_files
from stages.tools.comparison.variants_over_seeds import (
    VariantOfMethod,
    variants_over_seeds,
    variants_to_json,
    variants_to_numbers,
    variants_to_parts,
)

COMPARED = ("fid", FID_DENSE, "ssim")
"""Metrics whose difference from the baseline is reported."""
TITLE = "methods at equal size and equal steps"
PARETO_CAPTION = "FID over MACs of each method, with 95 % intervals over the seeds"
ABLATION_CAPTION = "SSIM of the pruned model by the number of timesteps that importance used"
DODGE = 0.02
"""Horizontal distance between two methods, which all have equal MACs, as a share of the dense model's MACs."""


def to_rows(comparison: Comparison) -> list[dict[str, str]]:
    """Write the table's texts, one row per method: column -> text."""
    return [
        {
            "method": method.title,
            "params": write_params(method.first.params),
            "MACs": write_count(method.first.macs),
            "FID": write_estimate(method.estimate("fid"), 3),
            "FID difference": write_difference(comparison.difference(method, "fid"), 3),
            "FID to dense": write_fid_dense(comparison, method),
            "FID to dense difference": write_difference(comparison.difference(method, FID_DENSE), 3),
            "KID × 10³": write_estimate(method.estimate("kid"), 2, factor=1e3),
            "SSIM": write_estimate(method.estimate("ssim"), 4),
            "SSIM difference": write_difference(comparison.difference(method, "ssim"), 4),
            "finetune steps": "–" if method.steps is None else f"{method.steps:,}",
            "seeds": str(len(method.models)),
        }
        for method in comparison.rows
    ]


def write_fid_dense(comparison: Comparison, method: Method) -> str:
    """Write the FID to the dense model's images; the dense model itself has the floor instead, if there is one."""
    floor = comparison.fid_dense_floor
    if method is comparison.dense and floor:
        return f"floor {write_estimate(floor, 3)}"
    found = method.measured(FID_DENSE)
    return write_estimate(found, 3) if found else "–"


def to_markdown(comparison: Comparison, preset: str, command: str, variants: Sequence[VariantOfMethod] = ()) -> str:
    """Write all tables, each followed by its explanation; the published ones come last."""
    parts = [
        f"# {preset}: {TITLE}",
        rows_to_markdown(to_rows(comparison)),
        _explain(comparison, command),
        *variants_to_parts(variants),
        *_ablation_to_parts(comparison.ablation),
        *_published_to_parts(read_published().get(preset, ()), comparison),
    ]
    return "\n\n".join(parts) + "\n"


def _explain(comparison: Comparison, command: str) -> str:
    intervals = (
        f"± is half of the 95 % interval over the seeds. Each seed repeats calibration, training and sampling, so the "
        f"interval covers their variation; it covers neither the choice of data nor the bias of FID with few images. "
        f"{_explain_differences(comparison)}"
        f"Intervals are not corrected for multiple comparisons, so among this many one may miss by chance."
        if len(comparison.dense.models) > 1
        else ONE_SEED
    )
    made_by = f"\n\nMade by `{command}`" if command else ""
    fid_dense = fid_dense_to_text(comparison.cells[0].record)
    return f"{intervals} {fid_dense} {protocols_to_text(comparison.cells)}{made_by}"


def _explain_differences(comparison: Comparison) -> str:
    name = METHODS[BASELINE]
    if BASELINE not in comparison.methods:
        return f"No differences, since their baseline, {name}, was left out. "
    same = {"taylor", "diff-pruning-0"} <= comparison.methods.keys()
    twice = "Taylor and Diff-Pruning with T = 0 are the same computation under the paper's formula. " if same else ""
    return f"Differences are from {name}, paired by seed; {ALIKE} marks those whose interval contains zero. {twice}"


def _ablation_to_parts(ablation: Mapping[int, Estimate]) -> list[str]:
    if not ablation:
        return []
    rows = [{"timesteps used": str(count), "SSIM": write_estimate(ssim, 4)} for count, ssim in ablation.items()]
    note = "Taylor importance summed over the first timesteps only, ratio .15, pruned model without finetuning."
    return ["## SSIM by the number of timesteps used", rows_to_markdown(rows), note]


def _published_to_parts(tables: Sequence[PublishedTable], comparison: Comparison) -> list[str]:
    if not tables:
        return []
    heading = "## As published, under other protocols: not to be compared with the tables above"
    note = (
        f"Each table has a protocol of its own. “here” marks rows with the MACs of this comparison, within "
        f"{SIZE_TOLERANCE:.0%}; the others are of another size. Speed: the dense model's time over the row's."
    )
    return [heading, note, *(part for table in tables for part in _published_table_to_parts(table, comparison))]


def _published_table_to_parts(table: PublishedTable, comparison: Comparison) -> list[str]:
    caveat = " These numbers are recalled and were not checked again." if table.source == "recalled" else ""
    parts = [
        rows_to_markdown([_published_row(row, comparison) for row in table.rows]),
        f"{table.paper}; {table.protocol}.{caveat}",
    ]
    if table.ablation:
        ablation = [{"timesteps used": str(count), "SSIM": f"{ssim:.3f}"} for count, ssim in table.ablation.items()]
        parts += [rows_to_markdown(ablation), "As published: ratio .15, no finetuning."]
    return parts


def _published_row(row: PublishedRow, comparison: Comparison) -> dict[str, str]:
    """Write a published row, marked if it has the MACs of the dense model or of the methods of the comparison."""
    here = [method.first.macs for method in comparison.rows[:2]]
    return {
        "method": row.method,
        "params": "–" if row.params is None else f"{row.params / 1e6:.1f} M",
        "MACs": "–" if row.macs is None else write_count(row.macs),
        "size": "–" if row.macs is None else "here" if any(map(row.is_of_size, here)) else "another",
        "FID": f"{row.fid:g}",
        "SSIM": "–" if row.ssim is None else f"{row.ssim:.3f}",
        "steps": "–" if row.steps is None else f"{row.steps:,}",
        "speed": "–" if row.speed is None else f"{row.speed:g}×",
    }


def _numbers(cell: FinishedCell) -> dict[str, Any]:
    numbers: dict[str, Any] = {"row": cell.note.row, "seed": cell.seed}
    for name, model in cell.record.models.items():
        numbers |= {f"{name}.params": model.params, f"{name}.macs": model.macs, f"{name}.fid_pooled": model.fid_pooled}
        for metric, found in model.metrics().items():
            numbers |= {f"{name}.{metric}": found.mean, f"{name}.{metric}_interval": found.half_width}
    origin = {"ran": " ".join(cell.note.ran), "mlflow_run": cell.note.mlflow_run, "protocol": cell.record.protocol_id}
    return {**numbers, **variants_to_numbers(cell), **origin, **cell.note.overrides}


def to_json(
    comparison: Comparison, preset: str, command: str, variants: Sequence[VariantOfMethod] = ()
) -> dict[str, Any]:
    """Make the content of method_table.json: the table's texts, and its estimates as numbers."""
    rows = to_rows(comparison)
    return {
        "preset": preset,
        "command": command,
        "baseline": BASELINE,
        "seeds": sorted(comparison.dense.models),
        "header": list(rows[0]),
        "rows": [list(row.values()) for row in rows],
        "methods": {
            method.title: {
                **{name: asdict(found) for name in (*METRICS, FID_DENSE) if (found := method.measured(name))},
                **{f"{name}_difference": _to_dict(comparison.difference(method, name)) for name in COMPARED},
            }
            for method in comparison.rows
        },
        "fid_dense_floor": asdict(comparison.fid_dense_floor) if comparison.fid_dense_floor else None,
        "variants": variants_to_json(variants),
        "ablation": {str(count): asdict(ssim) for count, ssim in comparison.ablation.items()},
    }


def _to_dict(difference: Estimate | None) -> dict[str, Any] | None:
    return None if difference is None else {**asdict(difference), "is_distinct": difference.is_distinct}


def draw_pareto(axis: Axes, comparison: Comparison) -> None:
    """Draw FID over MACs with intervals over the seeds; methods of equal MACs stand side by side."""
    palette = [COLOURS[DENSE], *mpl.color_sequences["Dark2"]]
    step = DODGE * comparison.dense.first.macs / 1e6
    for index, method in enumerate(comparison.rows):
        offset = (index - (len(comparison.methods) + 1) / 2) * step if index else 0
        fid = method.estimate("fid")
        axis.errorbar(
            method.first.macs / 1e6 + offset,
            fid.mean,
            yerr=fid.half_width,
            fmt="o",
            capsize=3,
            markersize=5,
            color=palette[index % len(palette)],
            label=method.title,
        )
    axis.set(xlabel="million MACs a pass", ylabel="FID (logarithmic)", xlim=(0, None))
    plain_log(axis)
    legend_above(axis)


def draw_ablation(axis: Axes, ablation: Mapping[int, Estimate]) -> None:
    """Draw SSIM over the number of timesteps used."""
    axis.errorbar(
        list(ablation),
        [ssim.mean for ssim in ablation.values()],
        yerr=[ssim.half_width or 0 for ssim in ablation.values()],
        fmt="o-",
        capsize=3,
        color=COLOURS[ONE_SHOT],
    )
    axis.set(xlabel="timesteps used", ylabel="SSIM without finetuning", xlim=(0, None))


def make_lead(comparison: Comparison, preset: str) -> Lead:
    """Make what the page begins with: the method of the lowest FID, and the verdict on each of its seeds."""
    title, captions = f"{preset}: {TITLE}", {"pareto": PARETO_CAPTION, "ablation": ABLATION_CAPTION}
    if not comparison.methods:
        text = "Only the number of timesteps was varied, without finetuning."
        return Lead(title, Verdict(level="changed", sentence=text, reasons=()), captions)
    best = min(comparison.methods.values(), key=lambda method: method.estimate("fid").mean)
    found = comparison.difference(best, "fid")
    apart = f", {write_difference(found, 3)} from {METHODS[BASELINE]}" if found else ""
    cells = [cell for cell in comparison.cells if METHODS.get(cell.note.row) == best.title]
    verdicts = {cell.seed: judge(cell.record, cell.costs) for cell in cells}
    count = len(comparison.methods)
    lowest = f"lowest FID of {count} methods" if count > 1 else "only method"
    sentence = f"{best.title} has the {lowest}: {write_estimate(best.estimate('fid'), 3)}{apart}."
    reasons = [f"Seed {seed}: {verdict.sentence}" for seed, verdict in verdicts.items()]
    level = worst_level(list(verdicts.values()))
    return Lead(title, Verdict(level=level, sentence=sentence, reasons=tuple(reasons)), captions)


def write_method_table(cells: Path, out: Path, preset: str, command: str) -> None:
    """Write index.html, table.md, table.csv, method_table.json and the plots that have a point: pareto and ablation.

    Raises:
        InputError: The cells cannot be read or compared, or `out` cannot be written.
    """
    comparison = read_comparison(cells)
    titles = {row: method.title for row, method in comparison.methods.items()}
    variants = variants_over_seeds(comparison.cells, titles)
    numbers = [_numbers(cell) for cell in comparison.cells]
    plots = {"pareto": lambda axis: draw_pareto(axis, comparison)} if comparison.methods else {}
    if comparison.ablation:
        plots["ablation"] = lambda axis: draw_ablation(axis, comparison.ablation)
    markdown = to_markdown(comparison, preset, command, variants)
    summary = to_json(comparison, preset, command, variants)
    write_table_files(out, "method_table", make_lead(comparison, preset), markdown, numbers, summary, plots)
