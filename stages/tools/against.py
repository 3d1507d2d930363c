"""The reports of two commits -> a table of the finetuned model's numbers, with the interval of each difference."""

import math
from collections.abc import Iterator
from pathlib import Path

from stages.protocol.costs import Cost, read_costs
from stages.protocol.evaluation import FID_DENSE, Metric, Model, read_evaluation
from stages.protocol.intervals import Estimate
from stages.protocol.verdict import FINETUNED, read_verdict
from stages.report.markdown import markdown_table
from stages.report.table import ALIKE, write_count, write_metric, write_params, write_speed_up
from stages.tools.comparison.estimates import write_difference
from stages.tools.diff import diff_evaluations, version_warning

SHOWN = {
    "fid": ("FID", 3, 1.0),
    FID_DENSE: ("FID to dense", 3, 1.0),
    "kid": ("KID × 10³", 2, 1e3),
    "precision": ("precision", 3, 1.0),
    "recall": ("recall", 3, 1.0),
    "ssim": ("SSIM", 3, 1.0),
}
"""Metric -> heading, digits and factor."""


def compare_reports(base: Path, reports: Path, name: str) -> str:
    """Write the comparison as Markdown.

    Args:
        base: Folder of the other commit's reports.
        reports: Folder of the reports here.
        name: What to call the other commit.

    Raises:
        InputError: The protocols differ, or a report is missing or damaged.
    """
    folders = base / "evaluate", reports / "evaluate"
    differences = diff_evaluations(*folders, FINETUNED)
    one, other = (read_evaluation(folder).models[FINETUNED] for folder in folders)
    speeds = _speed_row(*(read_costs(folder / "costs").first(FINETUNED) for folder in (base, reports)))
    rows = [*_size_rows(one, other), *_metric_rows(one, other, differences), speeds]
    table = markdown_table([FINETUNED, name, "here", "difference"], rows)
    note = f"Differences are paired by set of images; {ALIKE} marks those within their 95 % interval."
    before = f"Verdict at {name}: {read_verdict(base).sentence}"
    warning = version_warning(*folders)
    differing = f" The evaluations ran with different {warning.rpartition('different ')[2]}." if warning else ""
    return "\n\n".join([table, note + differing, before])


def _size_rows(one: Model, other: Model) -> Iterator[list[str]]:
    yield [
        "params",
        *(write_params(model.params) for model in (one, other)),
        f"{other.params / one.params - 1:+.1%}",
    ]
    yield ["MACs", *(write_count(model.macs) for model in (one, other)), f"{other.macs / one.macs - 1:+.1%}"]


def _metric_rows(one: Model, other: Model, differences: dict[str, Estimate]) -> Iterator[list[str]]:
    for name, (title, digits, factor) in SHOWN.items():
        found = [model.metrics().get(name) for model in (one, other)]
        text = write_difference(differences.get(name), digits, factor, alone="one set")
        yield [title, *(_write(metric, digits, factor) for metric in found), text]


def _write(metric: Metric | None, digits: int, factor: float) -> str:
    if metric is None:
        return "–"
    return write_metric(metric.model_copy(update={"above_dense": None}), digits, factor)


def _speed_row(one: Cost, other: Cost) -> list[str]:
    setting = f"speed-up, batch {other.batch}, {other.precision}"
    return [setting, write_speed_up(one), write_speed_up(other), _compare_speed(one, other)]


def _compare_speed(one: Cost, other: Cost) -> str:
    """Compare two speed-ups over the dense model, which only those of one setting and device allow."""
    settings = [(it.batch, it.precision, it.mode, it.device, it.deterministic) for it in (one, other)]
    if settings[0] != settings[1]:
        return "measured on another device or in another setting"
    if one.speed_up is None or other.speed_up is None:
        return "–"
    difference = other.speed_up - one.speed_up
    half_width = math.hypot(*(((it.speed_up_high or 0) - (it.speed_up_low or 0)) / 2 for it in (one, other)))
    return f"{difference:+.2f}{f' {ALIKE}' if abs(difference) <= half_width else ''}"
