"""Compressions of one dense model -> a table and a plot of quality against cost, with the best settings named."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes

from stages.protocol.evaluation import DENSE, FID_DENSE, EvaluationRecord, Metric
from stages.protocol.intervals import Estimate, estimate
from stages.protocol.variants import VariantsRecord
from stages.protocol.verdict import FINETUNED, Verdict, judge
from stages.report.figures import COLOURS, plain_log
from stages.report.legend import legend_above
from stages.report.markdown import markdown_table
from stages.report.table import (
    ALIKE,
    conditions_to_text,
    fid_dense_to_text,
    latency_to_text,
    protocol_to_text,
    write_count,
    write_metric,
)
from stages.tools.cells import FinishedCell
from stages.tools.estimates import write_difference, write_estimate
from stages.tools.methods import seed_of
from stages.tools.sweep_settings import Setting, find_front, rank, read_settings, swept_keys, write_overrides
from stages.tools.table_files import Lead, write_table_files
from stages.tools.variants_over_seeds import read_variants_of_cells, variants_to_numbers

DODGE = 0.01
"""Horizontal distance between points of two colours at one budget, as a share of the dense model's MACs."""


def to_rows(settings: Sequence[Setting], baseline: str = "") -> list[dict[str, str]]:
    """Write the table's texts, one row per setting: column -> text; over seeds with differences from a baseline.

    Args:
        settings: In the order of the rows.
        baseline: The cell whose setting the others are compared with, seed by seed.
    """
    front, keys = find_front(settings), swept_keys(settings)
    first = next((it for it in settings if baseline in [cell.name for cell in it.cells]), None)
    is_repeated = any(setting.is_repeated for setting in settings)
    return [
        {
            **{key: str(setting.overrides.get(key)) for key in keys},
            "MACs": f"{write_count(setting.macs)} ({setting.share:.1%})",
            "params": f"{fmean(model.params for model in setting.models) / 1e6:.3f} M",
            "FID": _write_fid(setting),
            **(_write_differences(setting, first) if is_repeated else {}),
            "FID to dense": _write(setting.measured(FID_DENSE), 3),
            "KID × 10³": _write(setting.measured("kid"), 2, factor=1e3),
            "SSIM": _write(setting.measured("ssim"), 3),
            "latency": _write_latency(setting),
            "front": "●" if setting in front else "",
            **({"seeds": str(len(setting.cells))} if is_repeated else {"MLflow run": setting.first.note.mlflow_run}),
        }
        for setting in settings
    ]


def _write_fid(setting: Setting) -> str:
    text = _write(setting.fid, 3)
    return f"{text} {ALIKE}" if setting.is_repeated and setting.is_like_dense else text


def _write_differences(setting: Setting, first: Setting | None) -> dict[str, str]:
    digits = {"fid": ("FID difference", 3), "ssim": ("SSIM difference", 4)}
    return {
        title: write_difference(setting.difference(first, name) if first else None, number)
        for name, (title, number) in digits.items()
    }


def _write(found: Metric | Estimate | None, digits: int, factor: float = 1) -> str:
    if found is None:
        return "–"
    write = write_metric if isinstance(found, Metric) else write_estimate
    return write(found, digits, factor)  # type: ignore[arg-type]  # each with its own


def _write_latency(setting: Setting) -> str:
    found = [cell.costs.first(FINETUNED).median_ms for cell in setting.cells]
    times = [ms for ms in found if ms is not None]
    return "–" if len(times) < len(found) else f"{write_estimate(estimate(times), 2)} ms"


def to_markdown(
    settings: Sequence[Setting], records: Mapping[str, VariantsRecord] | None = None, baseline: str = ""
) -> str:
    """Write the table, followed by the overrides that all cells share, the dense model, the protocol and variants."""
    rows = to_rows(settings, baseline)
    table = markdown_table(list(rows[0]), [row.values() for row in rows], text_columns=len(rows[0]))
    cells = [cell for setting in settings for cell in setting.cells]
    record, keys = cells[0].record, swept_keys(settings)
    dense = record.models[DENSE]
    same = {key: value for key, value in settings[0].overrides.items() if key not in keys}
    latency = " ".join(dict.fromkeys(latency_to_text(cell.costs) for cell in cells))
    common = f"All cells: {write_overrides(same)}. " if same else ""
    is_repeated = any(setting.is_repeated for setting in settings)
    dense_fid, spread = _over_seeds(cells) if is_repeated else (write_metric(dense.fid, 3), _of_one_seed(record))
    return (
        f"{table}\n\n{common}● no other row has both fewer MACs and a lower FID. Dense: {write_count(dense.macs)} "
        f"MACs, FID {dense_fid}. {spread} {latency}\n{_variants_to_text(cells, keys, records or {})}"
    )


def _of_one_seed(record: EvaluationRecord) -> str:
    note = "Each cell is one training, so the intervals do not cover the variation between seeds."
    return f"{note} {protocol_to_text(record)}"


def _over_seeds(cells: Sequence[FinishedCell]) -> tuple[str, str]:
    """Return the dense model's FID over the seeds, and the explanation of the intervals and the protocol."""
    fids = {seed_of(cell): cell.record.models[DENSE].fid.mean for cell in cells}
    conditions = conditions_to_text(cells[0].record.protocol, f"seeds {', '.join(map(str, sorted(fids)))}")
    return write_estimate(estimate(list(fids.values())), 3), (
        f"± is half of the 95 % interval over the seeds. {ALIKE} beside a FID: its difference from dense has an "
        f"interval that contains zero; beside a difference: that interval does. All differences are paired by seed; "
        f"those of the columns are from the first values of the grid. {fid_dense_to_text(cells[0].record)} {conditions}"
    )


def _variants_to_text(cells: Sequence[FinishedCell], keys: Sequence[str], records: Mapping[str, VariantsRecord]) -> str:
    rows = _variant_rows(cells, keys, records)
    if not rows:
        return ""
    table = markdown_table(list(rows[0]), [row.values() for row in rows], text_columns=len(rows[0]))
    return f"\n## Variants\n\n{table}\n\nUnder the protocol of the models above, from the same noise.\n"


def _variant_rows(
    cells: Sequence[FinishedCell], keys: Sequence[str], records: Mapping[str, VariantsRecord]
) -> list[dict[str, str]]:
    """Write the texts of all variants: column -> text; those of the dense model stand once a seed, first."""
    having = [cell for cell in cells if cell.name in records]
    dense = {seed_of(cell): cell for cell in having}
    found = [(cell, it) for cell in dense.values() for it in records[cell.name].variants.values() if it.model == DENSE]
    found += [(cell, it) for cell in having for it in records[cell.name].variants.values() if it.model != DENSE]
    return [
        {
            **{key: "–" if it.model == DENSE else str(cell.note.overrides.get(key)) for key in keys},
            **({"seed": str(seed_of(cell))} if len(dense) > 1 else {}),
            "variant": f"{it.model} + {it.kind.title}",
            "on disk": f"{it.size_bytes / 1e6:.2f} MB",
            "FID": write_metric(it.metrics["fid"], 3),
            "FID to dense": write_metric(it.metrics[FID_DENSE], 3),
            "KID × 10³": write_metric(it.metrics["kid"], 2, factor=1e3),
            "SSIM": write_metric(it.metrics["ssim"], 3),
        }
        for cell, it in found
    ]


def to_json(settings: Sequence[Setting], baseline: str = "") -> dict[str, Any]:
    """Make the content of sweep_table.json: the table's texts, and the names of the front's cells, the best first.

    Of a setting with several seeds the cell of the lowest one stands for it.
    """
    rows = to_rows(settings, baseline)
    return {
        "header": list(rows[0]),
        "rows": [list(row.values()) for row in rows],
        "best": [setting.first.name for setting in rank(find_front(settings))],
    }


def _numbers(cell: FinishedCell, variants: VariantsRecord | None) -> dict[str, Any]:
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
        "latency_precision": latency.precision,
        "latency_deterministic": latency.deterministic,
        **(variants_to_numbers(variants) if variants else {}),
        "ran": " ".join(cell.note.ran),
        "mlflow_run": cell.note.mlflow_run,
        "protocol": cell.record.protocol_id,
    }


def draw(axis: Axes, settings: Sequence[Setting]) -> None:
    """Draw FID over MACs with the front as a dotted line; each value of the first swept key has one colour."""
    dense = settings[0].first.record.models[DENSE]
    style: dict[str, Any] = {"fmt": "o", "capsize": 3, "markersize": 6}
    axis.errorbar(
        dense.macs / 1e6, dense.fid.mean, yerr=dense.fid.half_width, color=COLOURS[DENSE], label="dense", **style
    )
    first_key = next(iter(swept_keys(settings)), "")
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(str(setting.overrides.get(first_key)), []).append(setting)
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


def make_lead(settings: Sequence[Setting]) -> Lead:
    """Make what the page begins with: the verdict on the best setting, by its first seed, and on each cell."""
    best = rank(find_front(settings))[0]
    verdict = judge(best.first.record, best.first.costs, FINETUNED)
    reasons = [
        f"{_name(setting, cell)}: {judge(cell.record, cell.costs, FINETUNED).sentence}"
        for setting in settings
        for cell in setting.cells
    ]
    count, name = len(settings), _name(best, best.first)
    sentence = f"Best of {count}, {name}: {verdict.sentence}" if count > 1 else verdict.sentence
    found = Verdict(level=verdict.level, sentence=sentence, reasons=tuple(reasons))
    return Lead("Sweep: quality against cost", found, {"pareto": "FID over MACs of each setting, with 95 % intervals"})


def _name(setting: Setting, cell: FinishedCell) -> str:
    return f"{setting.label()}, seed {seed_of(cell)}" if setting.is_repeated else setting.label()


def write_sweep_table(folder: Path, out: Path, baseline: str = "") -> None:
    """Write index.html, table.md, table.csv, sweep_table.json, pareto.svg and pareto.png.

    Args:
        folder: One subfolder per finished cell.
        out: Output folder.
        baseline: Name of the cell whose setting the others are compared with, where the seed is swept.

    Raises:
        InputError: The cells cannot be read or compared, or `out` cannot be written.
    """
    settings = read_settings(folder)
    cells = [cell for setting in settings for cell in setting.cells]
    records = read_variants_of_cells(folder, cells)
    numbers = [_numbers(cell, records.get(cell.name)) for cell in cells]
    plots = {"pareto": lambda axis: draw(axis, settings)}
    markdown, summary = to_markdown(settings, records, baseline), to_json(settings, baseline)
    write_table_files(out, "sweep_table", make_lead(settings), markdown, numbers, summary, plots)
