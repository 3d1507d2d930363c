"""Compressions of one dense model -> a table and a plot of quality against cost, with the best settings named."""

from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes

from stages.protocol.evaluation import DENSE, FID_DENSE, Metric
from stages.protocol.intervals import Estimate
from stages.protocol.verdict import FINETUNED, Verdict, judge
from stages.report.figures import COLOURS, plain_log
from stages.report.legend import legend_above
from stages.report.markdown import rows_to_markdown
from stages.report.table import (
    ALIKE,
    fid_dense_to_text,
    latency_to_text,
    protocol_to_text,
    write_count,
    write_metric,
    write_params,
    write_size,
    write_speed_up,
)
from stages.report.table_page import worst_level
from stages.runtime.wording import count as count_text
from stages.tools.comparison.cells import FinishedCell
from stages.tools.comparison.estimates import (
    estimate_time,
    protocols_to_text,
    write_difference,
    write_estimate,
    write_speed_up_over_seeds,
)
from stages.tools.comparison.sweep_settings import Setting, Sweep, find_front, rank, read_sweep, swept_keys
from stages.tools.comparison.table_files import Lead, write_table_files
from stages.tools.comparison.variants_over_seeds import variants_of_groups, variants_to_numbers, variants_to_parts
from stages.tools.params_yaml import write_overrides, write_value

DODGE = 0.01
"""Horizontal distance between points of two colours at one budget, as a share of the dense model's MACs."""


def to_rows(sweep: Sweep) -> list[dict[str, str]]:
    """Write the table's texts, one row per setting: column -> text."""
    settings, front = sweep.settings, find_front(sweep.settings)
    keys, repeated = swept_keys(settings), sweep.is_over_seeds
    return [
        {
            **{key: write_value(setting.overrides.get(key)) for key in keys},
            "MACs": f"{write_count(setting.macs)} ({setting.share:.1%})",
            "params": write_params(fmean(model.params for model in setting.models)),
            "FID": _write_fid(setting),
            **_write_difference(setting, sweep, "fid", 3),
            "FID to dense": _write(setting.measured(FID_DENSE), 3),
            "KID × 10³": _write(setting.measured("kid"), 2, factor=1e3),
            "SSIM": _write(setting.measured("ssim"), 3),
            **_write_difference(setting, sweep, "ssim", 4),
            "latency": _write_latency(setting),
            "speed-up": write_speed_up_over_seeds(setting.costs),
            "front": "●" if setting in front else "",
            **({"seeds": str(len(setting.cells))} if repeated else {"MLflow run": setting.first.note.mlflow_run}),
        }
        for setting in settings
    ]


def _write_fid(setting: Setting) -> str:
    text = _write(setting.fid, 3)
    return f"{text} {ALIKE}" if setting.is_over_seeds and setting.is_like_dense else text


def _write_difference(setting: Setting, sweep: Sweep, name: str, digits: int) -> dict[str, str]:
    """Write the column of a difference from the baseline; none where nothing is compared with it."""
    if sweep.baseline is None or not _compares(sweep):
        return {}
    return {f"{name.upper()} difference": write_difference(setting.difference(sweep.baseline, name), digits)}


def _compares(sweep: Sweep) -> bool:
    return sweep.is_over_seeds and sweep.baseline is not None and len(sweep.settings) > 1


def _write(found: Metric | Estimate | None, digits: int, factor: float = 1) -> str:
    if found is None:
        return "–"
    write = write_metric if isinstance(found, Metric) else write_estimate
    return write(found, digits, factor)  # type: ignore[arg-type]  # each with its own


def _write_latency(setting: Setting) -> str:
    """Write the latency; a mean over different machines or modes would mean nothing."""
    found = estimate_time(setting.costs, "median_ms")
    return f"{write_estimate(found, 2)} ms" if found else "–"


def to_markdown(sweep: Sweep) -> str:
    """Write the table, followed by the overrides that all cells share, the dense model, the protocol and variants."""
    rows, settings, cells = to_rows(sweep), sweep.settings, sweep.cells
    table = rows_to_markdown(rows, text_columns=len(rows[0]))
    dense, keys = cells[0].record.models[DENSE], swept_keys(settings)
    same = {key: value for key, value in settings[0].overrides.items() if key not in keys}
    latency = " ".join(dict.fromkeys(latency_to_text(cell.costs) for cell in cells))
    common = f"All cells: {write_overrides(same)}. " if same else ""
    note = (
        f"{common}● no other row has both fewer MACs and a lower FID. Dense: {write_count(dense.macs)} MACs, FID "
        f"{_write(sweep.dense_fid, 3)}. {_explain(sweep)} {latency}"
    )
    return "\n\n".join([table, note, *_variants_to_parts(sweep)]) + "\n"


def _explain(sweep: Sweep) -> str:
    """Explain the intervals, and name the protocols."""
    record = sweep.cells[0].record
    if not sweep.is_over_seeds:
        note = "Each cell is one training, so the intervals do not cover the variation between seeds."
        return f"{note} {protocol_to_text(record)}"
    apart = f"Differences are from {sweep.label(sweep.baseline)}. " if sweep.baseline and _compares(sweep) else ""
    return (
        f"± is half of the 95 % interval over the seeds; it covers neither the choice of data nor the bias of FID with "
        f"few images. {ALIKE} beside a FID: its difference from dense has an interval that contains zero; beside a "
        f"difference: that interval does. All differences are paired by seed. {apart}{fid_dense_to_text(record)} "
        f"{protocols_to_text(sweep.cells)}"
    )


def _variants_to_parts(sweep: Sweep) -> list[str]:
    """Write heading, table and explanation of the variants; nothing without variants."""
    if sweep.is_over_seeds:
        groups = {sweep.label(setting): setting.cells for setting in sweep.settings}
        return variants_to_parts(variants_of_groups(groups))
    rows = _variant_rows(sweep)
    if not rows:
        return []
    table = rows_to_markdown(rows, text_columns=len(rows[0]))
    return ["## Variants", table, "Under the protocol of the models above, from the same noise."]


def _variant_rows(sweep: Sweep) -> list[dict[str, str]]:
    """Write the texts of all variants of single cells: column -> text; those of the dense model stand once, first."""
    found = [(cell, name, it) for cell in sweep.cells if cell.variants for name, it in cell.variants.variants.items()]
    dense = {name: (cell, name, it) for cell, name, it in reversed(found) if it.model == DENSE}
    others = [(cell, name, it) for cell, name, it in found if it.model != DENSE]
    keys = swept_keys(sweep.settings)
    return [
        {
            **{key: "–" if it.model == DENSE else write_value(cell.note.overrides.get(key)) for key in keys},
            "variant": f"{it.model} + {it.kind.title}",
            "on disk": write_size(it.size_bytes),
            "FID": write_metric(it.metrics["fid"], 3),
            "FID to dense": write_metric(it.metrics[FID_DENSE], 3),
            "KID × 10³": write_metric(it.metrics["kid"], 2, factor=1e3),
            "SSIM": write_metric(it.metrics["ssim"], 3),
            "speed-up": write_speed_up(cell.variant_costs.first(name)) if cell.variant_costs else "–",
        }
        for cell, name, it in [*dense.values(), *others]
    ]


def to_json(sweep: Sweep) -> dict[str, Any]:
    """Make the content of sweep_table.json: the table's texts, and the names of the front's cells, the best first.

    Of a setting with several seeds the cell of the lowest one stands for it.
    """
    rows = to_rows(sweep)
    return {
        "header": list(rows[0]),
        "rows": [list(row.values()) for row in rows],
        "best": [setting.first.name for setting in rank(find_front(sweep.settings))],
    }


def _numbers(cell: FinishedCell) -> dict[str, Any]:
    model, latency = cell.record.models[FINETUNED], cell.costs.first(FINETUNED)
    metrics = model.metrics()
    return {
        **cell.note.overrides,
        "macs": model.macs,
        "macs_share": 1 / cell.record.macs_ratio(FINETUNED),
        "params": model.params,
        **{name: metric.mean for name, metric in metrics.items()},
        **{f"{name}_interval": metric.half_width for name, metric in metrics.items()},
        "latency_ms": latency.median_ms,
        "speed_up": latency.speed_up,
        "latency_precision": latency.precision,
        "latency_deterministic": latency.deterministic,
        **variants_to_numbers(cell),
        "ran": " ".join(cell.note.ran),
        "mlflow_run": cell.note.mlflow_run,
        "protocol": cell.record.protocol_id,
    }


def draw(axis: Axes, sweep: Sweep) -> None:
    """Draw FID over MACs with the front as a dotted line; each value of the first swept key has one colour."""
    settings, fid = sweep.settings, sweep.dense_fid
    dense = settings[0].first.record.models[DENSE]
    style: dict[str, Any] = {"fmt": "o", "capsize": 3, "markersize": 6}
    axis.errorbar(dense.macs / 1e6, fid.mean, yerr=fid.half_width or 0, color=COLOURS[DENSE], label="dense", **style)
    first_key = next(iter(swept_keys(settings)), "")
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(write_value(setting.overrides.get(first_key, FINETUNED)), []).append(setting)
    palette = mpl.color_sequences["Dark2"]
    for index, (name, members) in enumerate(groups.items()):
        offset = (index - (len(groups) - 1) / 2) * DODGE * dense.macs / 1e6
        axis.errorbar(
            [setting.macs / 1e6 + offset for setting in members],
            [setting.fid.mean for setting in members],
            yerr=[setting.fid.half_width or 0 for setting in members],
            color=palette[index % len(palette)],
            label=name,
            **style,
        )
    front = find_front(settings)
    edge, line = mpl.rcParams["axes.edgecolor"], [setting.fid.mean for setting in front]
    axis.plot([setting.macs / 1e6 for setting in front], line, ":", color=edge, zorder=0)
    axis.set(xlabel="million MACs a pass", ylabel="FID (logarithmic)", xlim=(0, None))
    plain_log(axis)
    legend_above(axis)


def make_lead(sweep: Sweep) -> Lead:
    """Make what the page begins with: the verdict on the best setting, and that on each cell as reasons."""
    best, count = rank(find_front(sweep.settings))[0], len(sweep.settings)
    verdicts = {cell.name: judge(cell.record, cell.costs, FINETUNED) for cell in sweep.cells}
    found = verdicts[best.first.name].sentence
    if sweep.is_over_seeds:
        seeds = count_text(len(best.cells), "seed")
        fids = f"FID {_write(best.fid, 3)} over {seeds}, dense {_write(sweep.dense_fid, 3)}"
        found = f"{fids}; seed {best.first.seed}: {found}"
    sentence = f"Best of {count}, {sweep.label(best)}: {found}" if count > 1 else found
    reasons = [
        f"{_name(sweep, it, cell)}: {verdicts[cell.name].sentence}" for it in sweep.settings for cell in it.cells
    ]
    level = worst_level([verdicts[cell.name] for cell in best.cells])
    verdict = Verdict(level=level, sentence=sentence, reasons=tuple(reasons))
    caption = {"pareto": "FID over MACs of each setting, with 95 % intervals"}
    return Lead("Sweep: quality against cost", verdict, caption)


def _name(sweep: Sweep, setting: Setting, cell: FinishedCell) -> str:
    label = sweep.label(setting)
    return f"{label}, seed {cell.seed}" if sweep.is_over_seeds else label


def write_sweep_table(folder: Path, out: Path, baseline: str = "") -> None:
    """Write index.html, table.md, table.csv, sweep_table.json, pareto.svg and pareto.png.

    Args:
        folder: One subfolder per finished cell.
        out: Output folder.
        baseline: Name of the cell whose setting the others are compared with, where the seed is swept.

    Raises:
        InputError: The cells cannot be read or compared, or `out` cannot be written.
    """
    sweep = read_sweep(folder, baseline)
    numbers = [_numbers(cell) for cell in sweep.cells]
    plots = {"pareto": lambda axis: draw(axis, sweep)}
    write_table_files(out, "sweep_table", make_lead(sweep), to_markdown(sweep), numbers, to_json(sweep), plots)
