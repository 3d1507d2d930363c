"""A comparison of methods -> its table, its plots and its numbers, with what the paper published beside them."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes

from stages.protocol.evaluation import DENSE, METRICS
from stages.protocol.intervals import Estimate
from stages.report.figures import COLOURS, draw_figure, plain_log
from stages.report.table import ALIKE, conditions_to_text, write_count
from stages.storage.files import write_json, writing
from stages.storage.provenance import write_run_record
from stages.tools.cells import FinishedCell
from stages.tools.methods import ONE_SHOT, Comparison, read_comparison, seed_of
from stages.tools.published import BASELINE, METHODS, Published, read_published

COMPARED = ("fid", "ssim")
"""The metrics whose difference from the baseline is told."""
DODGE = 0.02
"""Of the dense model's MACs, between two methods, which all have the same."""


def to_rows(comparison: Comparison) -> list[dict[str, str]]:
    """Write one row a method."""
    return [
        {
            "method": method.title,
            "params": f"{method.first.params / 1e6:.3f} M",
            "MACs": write_count(method.first.macs),
            "FID": write_estimate(method.estimate("fid"), 3),
            "FID difference": write_difference(comparison.difference(method, "fid"), 3),
            "KID × 10³": write_estimate(method.estimate("kid"), 2, factor=1e3),
            "SSIM": write_estimate(method.estimate("ssim"), 4),
            "SSIM difference": write_difference(comparison.difference(method, "ssim"), 4),
            "finetune steps": "–" if method.steps is None else f"{method.steps:,}",
            "seeds": str(len(method.models)),
        }
        for method in comparison.rows
    ]


def write_estimate(found: Estimate, digits: int, factor: float = 1, sign: str = "") -> str:
    """Write a mean over seeds and half of its interval."""
    text = f"{found.mean * factor:{sign}.{digits}f}"
    return text if found.half_width is None else f"{text} ± {found.half_width * factor:.{digits}f}"


def write_difference(found: Estimate | None, digits: int) -> str:
    """Write a difference, its interval, and a mark where it cannot be told from zero."""
    if found is None:
        return "–"
    marks = {None: " (one seed)", False: f" {ALIKE}", True: ""}
    return f"{write_estimate(found, digits, sign='+')}{marks[found.is_distinct]}"


def to_markdown(comparison: Comparison, preset: str, command: str) -> str:
    """Write the tables, ours first, with what each of them is."""
    published = read_published().get(preset)
    parts = [
        f"# {preset}: methods at equal size and equal steps",
        _to_table(to_rows(comparison)),
        _explain(comparison, command),
        *_ablation_to_parts(comparison.ablation),
        *(_published_to_parts(published) if published else ()),
    ]
    return "\n\n".join(parts) + "\n"


def _to_table(rows: Sequence[Mapping[str, str]]) -> str:
    header = list(rows[0])
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _explain(comparison: Comparison, command: str) -> str:
    records = {seed_of(cell): cell.record for cell in comparison.cells}
    protocol = next(iter(records.values())).protocol
    names = ", ".join(record.protocol_id for record in records.values())
    intervals = (
        f"± is half of the 95 % interval over the seeds: with each of them calibration, training and drawing begin "
        f"anew, so it covers how much these vary, and nothing of the data or of the bias that FID has from few images. "
        f"{_tell_of_differences(comparison)}"
        f"Each interval is for itself: with as many as here, one may miss by chance."
        if len(records) > 1
        else "One seed, so no intervals: nothing here says what another training would give."
    )
    said = f"{intervals} Protocols, which differ in the seed alone ({names}): "
    drawn = conditions_to_text(protocol, f"seeds {', '.join(map(str, records))}")
    made = f"\n\nMade by `{command}`" if command else ""
    return f"{said}{drawn}{made}"


def _tell_of_differences(comparison: Comparison) -> str:
    name = METHODS[BASELINE]
    if BASELINE not in comparison.methods:
        return f"No differences, since {name}, which they are taken from, was left out. "
    same = {"taylor", "diff-pruning-0"} <= comparison.methods.keys()
    twice = "Taylor and Diff-Pruning with T = 0 are one computation by the paper's formula. " if same else ""
    return f"Differences are from {name}, seed by seed; {ALIKE} marks those that cannot be told from zero. {twice}"


def _ablation_to_parts(ablation: Mapping[int, Estimate]) -> list[str]:
    if not ablation:
        return []
    rows = [{"timesteps used": str(count), "SSIM": write_estimate(it, 4)} for count, it in ablation.items()]
    said = "Taylor importance summed over the first timesteps alone, ratio .15, the pruned model without finetuning."
    return ["## SSIM by the number of timesteps used", _to_table(rows), said]


def _published_to_parts(published: Published) -> list[str]:
    def write(value: float | None, text: str) -> str:
        return "–" if value is None else format(value, text)

    rows = [
        {
            "method": row.method,
            "params": f"{row.params / 1e6:.1f} M",
            "MACs": write_count(row.macs),
            "FID": f"{row.fid:g}",
            "SSIM": write(row.ssim, ".3f"),
            "steps": write(row.steps, ","),
        }
        for row in published.rows
    ]
    doubt = " These are recalled and were not checked again." if published.source == "recalled" else ""
    parts = [
        "## As published, under another protocol: not to be compared with the tables above",
        _to_table(rows),
        f"Fang et al., arXiv 2305.10924; {published.protocol}.{doubt}",
    ]
    if published.ablation:
        found = [{"timesteps used": str(key), "SSIM": f"{ssim:.3f}"} for key, ssim in published.ablation.items()]
        parts += [_to_table(found), "As published: ratio .15, no finetuning."]
    return parts


def to_csv(comparison: Comparison) -> str:
    """Write the numbers themselves, one row a cell."""
    rows = [_numbers(cell) for cell in comparison.cells]
    target = io.StringIO()
    header = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(target, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return target.getvalue()


def _numbers(cell: FinishedCell) -> dict[str, Any]:
    found: dict[str, Any] = {"row": cell.cell.row, "seed": seed_of(cell)}
    for name, model in cell.record.models.items():
        found |= {f"{name}.params": model.params, f"{name}.macs": model.macs, f"{name}.fid_pooled": model.fid_pooled}
        for metric in METRICS:
            found |= {f"{name}.{metric}": model.metric(metric).mean}
            found |= {f"{name}.{metric}_interval": model.metric(metric).half_width}
    about = {"ran": " ".join(cell.cell.ran), "mlflow_run": cell.cell.mlflow_run, "protocol": cell.record.protocol_id}
    return {**found, **about, **cell.cell.overrides}


def to_json(comparison: Comparison, preset: str, command: str) -> dict[str, Any]:
    """Give what programs read: the table as text, and its estimates as numbers."""
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
                **{name: asdict(method.estimate(name)) for name in METRICS},
                **{f"{name}_difference": _to_dict(comparison.difference(method, name)) for name in COMPARED},
            }
            for method in comparison.rows
        },
        "ablation": {str(count): asdict(found) for count, found in comparison.ablation.items()},
    }


def _to_dict(found: Estimate | None) -> dict[str, Any] | None:
    return None if found is None else {**asdict(found), "is_distinct": found.is_distinct}


def draw_pareto(axis: Axes, comparison: Comparison) -> None:
    """Draw FID over MACs with intervals over the seeds, methods of equal MACs side by side."""
    palette = [COLOURS[DENSE], *mpl.color_sequences["Dark2"]]
    step = DODGE * comparison.dense.first.macs / 1e6
    for index, method in enumerate(comparison.rows):
        aside = (index - (len(comparison.methods) + 1) / 2) * step if index else 0
        found = method.estimate("fid")
        axis.errorbar(
            method.first.macs / 1e6 + aside,
            found.mean,
            yerr=found.half_width,
            fmt="o",
            capsize=3,
            markersize=5,
            color=palette[index % len(palette)],
            label=method.title,
        )
    axis.set(xlabel="million MACs a pass", ylabel="FID (logarithmic)", xlim=(0, None))
    plain_log(axis)
    axis.legend(fontsize=7)


def draw_ablation(axis: Axes, ablation: Mapping[int, Estimate]) -> None:
    """Draw SSIM over the number of timesteps used."""
    axis.errorbar(
        list(ablation),
        [found.mean for found in ablation.values()],
        yerr=[found.half_width or 0 for found in ablation.values()],
        fmt="o-",
        capsize=3,
        color=COLOURS[ONE_SHOT],
    )
    axis.set(xlabel="timesteps used", ylabel="SSIM without finetuning", xlim=(0, None))


def write_method_table(cells: Path, out: Path, preset: str, command: str) -> None:
    """Write table.md, table.csv, method_table.json, and as SVG and PNG pareto and, where it was run, ablation.

    Raises:
        InputError: The cells cannot be read or compared, or `out` cannot be written.
    """
    comparison = read_comparison(cells)
    plots = {"pareto": lambda axis: draw_pareto(axis, comparison)} if comparison.methods else {}
    if comparison.ablation:
        plots["ablation"] = lambda axis: draw_ablation(axis, comparison.ablation)
    with writing(out) as folder:
        (folder / "table.md").write_text(to_markdown(comparison, preset, command))
        (folder / "table.csv").write_text(to_csv(comparison))
        write_json(folder / "method_table.json", to_json(comparison, preset, command))
        for name, draw in plots.items():
            for kind in ("svg", "png"):
                (folder / f"{name}.{kind}").write_bytes(draw_figure(draw, "light", kind))
        write_run_record(folder, "tools")
