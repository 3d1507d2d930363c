"""A recovery comparison -> its tables: quality by steps and seconds, and when a recipe reaches the end of another."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages.protocol.intervals import Estimate, estimate
from stages.protocol.verdict import Verdict, judge
from stages.report.markdown import markdown_table, rows_to_markdown
from stages.report.table import ALIKE
from stages.report.table_page import LEVELS, worst_level
from stages.tools.comparison.curve_figure import draw_curves
from stages.tools.comparison.curves import (
    SECONDS,
    SHOWN,
    Curve,
    Curves,
    difference,
    differences_from_end,
    reach,
    read_curves,
    seconds_ratio,
)
from stages.tools.comparison.estimates import ONE_SEED, protocols_to_text, write_difference, write_estimate
from stages.tools.comparison.table_files import Lead, write_table_files
from stages.tools.comparison.variants_over_seeds import (
    VariantOfMethod,
    variants_over_seeds,
    variants_to_json,
    variants_to_parts,
)

TITLE = "what recovery costs"
BOTH = ("fid", "ssim")
"""Metrics of which the last line of each recipe requires all."""
SLACK = 0.05
"""Share by which a training may be later than another and still counts as equally long: seconds vary by as much."""
NOT_REACHED, UNKNOWN = "not reached", "–"


def to_rows(curves: Curves) -> list[dict[str, str]]:
    """Write all numbers as texts, one row per recipe and step: column -> text."""
    return [
        {
            "recipe": curve.title,
            "step": f"{step:,}",
            "seconds": _write(curve.estimate(step, SECONDS), 1),
            **{SHOWN[name].title: _write_metric(curve.estimate(step, name), name) for name in curves.metrics},
            "seeds": str(len(curve.seeds)),
        }
        for curve in curves.rows.values()
        for step in curve.steps
    ]


def _write(found: Estimate | None, digits: int, factor: float = 1) -> str:
    return UNKNOWN if found is None else write_estimate(found, digits, factor)


def _write_metric(found: Estimate | None, name: str) -> str:
    return _write(found, SHOWN[name].digits, SHOWN[name].factor)


def _write_difference(found: Estimate | None, name: str) -> str:
    return write_difference(found, SHOWN[name].digits, SHOWN[name].factor)


def to_markdown(curves: Curves, preset: str, command: str, variants: Sequence[VariantOfMethod] = ()) -> str:
    """Write all tables, each followed by its explanation."""
    parts = [f"# {preset}: {TITLE}", *_parts(curves, command), *variants_to_parts(variants)]
    return "\n\n".join(parts) + "\n"


def _parts(curves: Curves, command: str) -> Iterator[str]:
    for title, rows in metric_rows(curves):
        yield f"## {title} by steps"
        yield markdown_table(["recipe", *(f"{step:,}" for step in curves.steps)], rows)
    yield _explain(curves, command)
    yield f"## When a recipe reaches what {curves.baseline.title} has at its end"
    found = list(reach_rows(curves))
    yield rows_to_markdown(found, text_columns=2) if found else "No other recipe."
    yield _explain_reach(curves)
    yield from _seconds_parts(curves)


def metric_rows(curves: Curves) -> Iterator[tuple[str, list[list[str]]]]:
    """Write each metric at equal steps: title and, for each recipe, its name and one text per step."""
    for name in curves.metrics:
        rows = [
            [it.title, *(_at_equal_steps(curves, it, name, step) for step in curves.steps)]
            for it in curves.rows.values()
        ]
        yield SHOWN[name].title, rows


def _at_equal_steps(curves: Curves, curve: Curve, name: str, step: int) -> str:
    if step not in curve.points:
        return UNKNOWN
    text = _write_metric(curve.estimate(step, name), name)
    apart = None if curve is curves.baseline else difference(curve, curves.baseline, name, step)
    return f"{text} {ALIKE}" if apart and apart.is_distinct is False else text


def reach_rows(curves: Curves) -> Iterator[dict[str, str]]:
    """Write when each recipe reaches the first one's end, by each metric and by those of `BOTH`: column -> text."""
    other = curves.baseline
    singles = [(SHOWN[name].title, [name]) for name in curves.metrics]
    for curve in curves.rows.values():
        for title, metrics in [*singles, (" and ".join(SHOWN[it].title for it in BOTH), list(BOTH))]:
            if curve is not other:
                yield _reach_row(curve, other, title, metrics)


def _reach_row(curve: Curve, other: Curve, title: str, metrics: Sequence[str]) -> dict[str, str]:
    found, last = reach(curve, other, metrics), other.steps[-1]
    step = found.step
    differences = [_write_from_end(curve, other, name, step) for name in metrics] if step else []
    seconds = curve.estimate(step, SECONDS) if step else None
    ratio = seconds_ratio(curve, step, other) if step else None
    return {
        "recipe": curve.title,
        "by": title,
        "steps": f"{step:,}" if step else NOT_REACHED,
        "of its steps": f"{step / last:.2f}" if step else UNKNOWN,
        "difference then": " and ".join(differences) or UNKNOWN,
        "seed by seed": _write_range(list(found.by_seed.values())),
        "seconds": _write(seconds, 1),
        "of its seconds": _write(ratio, 2),
        "better from": f"{found.better:,}" if found.better else UNKNOWN,
    }


def _write_from_end(curve: Curve, other: Curve, name: str, step: int) -> str:
    return _write_difference(estimate(list(differences_from_end(curve, other, name, step).values())), name)


def _write_range(steps: Sequence[int | None]) -> str:
    """Write the lowest and the highest step, and how many seeds reach none."""
    reached = sorted(step for step in steps if step is not None)
    missing = len(steps) - len(reached)
    if not reached:
        return NOT_REACHED
    span = f"{reached[0]:,}" if reached[0] == reached[-1] else f"{reached[0]:,} to {reached[-1]:,}"
    return f"{span}, {missing} of {len(steps)} never" if missing else span


def _explain(curves: Curves, command: str) -> str:
    intervals = (
        f"± is half of the 95 % interval over the seeds. {ALIKE} marks a value whose difference from "
        f"{curves.baseline.title} at the same step, paired by seed, has an interval that contains zero."
        if len({cell.seed for cell in curves.cells}) > 1
        else ONE_SEED
    )
    schedule = "Each recipe was trained once a seed; its earlier columns are snapshots of that training."
    made_by = f"\n\nMade by `{command}`" if command else ""
    return f"{intervals} {schedule} {protocols_to_text(curves.cells)}{made_by}"


def _explain_reach(curves: Curves) -> str:
    title = curves.baseline.title
    return (
        f"steps: the first measured step from which on the mean difference from {title} at its end, paired by seed, is "
        f"nowhere worse beyond its interval; nothing is interpolated between measured steps. A wide interval is easily "
        f"reached: `difference then` is the mean difference at that step, {ALIKE} if its interval contains zero, and "
        f"`better from` is the step from which on the difference is better beyond its interval. seed by seed: "
        f"the lowest and highest step from which on the value of one seed is not worse than that of {title} at its end."
    )


def _seconds_parts(curves: Curves) -> Iterator[str]:
    """Write the seconds, and the metrics of `BOTH` at equal seconds; or why there are none."""
    yield "## Seconds"
    if len(curves.machines) != 1:
        why = f"on {' and '.join(curves.machines)}, which do not compare" if curves.machines else "in no cell"
        yield f"Not measured: seconds were taken {why}. Run the comparison with --jobs 1 on one machine."
        return
    steps = curves.baseline.steps
    rows = [[it.title, *(_write(it.estimate(step, SECONDS), 1) for step in steps)] for it in curves.rows.values()]
    yield markdown_table(["recipe", *(f"{step:,}" for step in steps)], rows)
    reasons = "they ran beside others or on several machines, or their times are lost."
    left_out = f" {curves.untimed} of {len(curves.cells)} trainings are left out: {reasons}"
    yield (
        f"Seconds of the optimiser steps so far, without measuring, drawing and saving, on {curves.machines[0]}; no "
        f"other run of a flow computed on the machine meanwhile.{left_out if curves.untimed else ''}"
    )
    for name in BOTH:
        yield from _equal_seconds_parts(curves, name)


def _equal_seconds_parts(curves: Curves, name: str) -> Iterator[str]:
    budgets = [
        (step, found.mean) for step in curves.baseline.steps if (found := curves.baseline.estimate(step, SECONDS))
    ]
    if not budgets:
        return
    yield f"## {SHOWN[name].title} at equal seconds"
    rows = [[it.title, *(_at_equal_seconds(it, name, budget) for _, budget in budgets)] for it in curves.rows.values()]
    yield markdown_table(["recipe", *(f"{budget:.1f} s" for _, budget in budgets)], rows)
    yield (
        f"The columns are the seconds of {curves.baseline.title} at its steps; in brackets the last measured step that "
        f"a recipe has taken by then, or at most {SLACK:.0%} later."
    )


def _at_equal_seconds(curve: Curve, name: str, budget: float) -> str:
    seconds = {step: found.mean for step in curve.steps if (found := curve.estimate(step, SECONDS))}
    taken = [step for step, value in seconds.items() if value <= budget * (1 + SLACK)]
    return f"{_write_metric(curve.estimate(taken[-1], name), name)} ({taken[-1]:,})" if taken else UNKNOWN


def _numbers(curves: Curves) -> list[dict[str, Any]]:
    """List the unrounded numbers, one row per recipe, seed and step."""
    return [
        {"recipe": row, "seed": seed, "step": step, **numbers}
        for row, curve in curves.rows.items()
        for step, by_seed in curve.points.items()
        for seed, numbers in sorted(by_seed.items())
    ]


def to_json(curves: Curves, preset: str, command: str, variants: Sequence[VariantOfMethod] = ()) -> dict[str, Any]:
    """Make the content of curve_table.json: the texts of all steps, estimates as numbers, and every pair of recipes."""
    rows, names = to_rows(curves), [*curves.metrics, SECONDS]
    return {
        "preset": preset,
        "command": command,
        "baseline": curves.baseline.title,
        "machines": list(curves.machines),
        "header": list(rows[0]),
        "rows": [list(row.values()) for row in rows],
        "curves": {
            row: {
                str(step): {name: asdict(found) for name in names if (found := curve.estimate(step, name))}
                for step in curve.steps
            }
            for row, curve in curves.rows.items()
        },
        "reach": {row: _reach_to_dict(curves, curve) for row, curve in curves.rows.items()},
        "variants": variants_to_json(variants),
    }


def _reach_to_dict(curves: Curves, curve: Curve) -> dict[str, Any]:
    """Make other recipe -> metrics -> when this one reaches the other's end."""
    sets = [*([name] for name in curves.metrics), list(BOTH)]
    others = {row: other for row, other in curves.rows.items() if other is not curve}
    return {
        row: {"+".join(names): asdict(reach(curve, other, names)) for names in sets} for row, other in others.items()
    }


def make_lead(curves: Curves, preset: str) -> Lead:
    """Make what the page begins with: the recipe that first reaches the first one's end by the metrics of `BOTH`."""
    other = curves.baseline
    found = {curve.title: reach(curve, other, BOTH).step for curve in curves.rows.values() if curve is not other}
    steps = {title: step for title, step in found.items() if step is not None and step < other.steps[-1]}
    what = f"what {other.title} has after {other.steps[-1]:,}, by {' and '.join(SHOWN[it].title for it in BOTH)}"
    if steps:
        first = min(steps, key=lambda title: steps[title])
        sentence = f"{first} reaches after {steps[first]:,} steps {what}."
    else:
        sentence = f"No other recipe reaches in fewer steps {what}." if found else f"{other.title} alone was measured."
    verdicts = {cell.name: judge(cell.record, cell.costs) for cell in curves.cells}
    reasons = [f"{cell.note.row}, seed {cell.seed}: {verdicts[cell.name].sentence}" for cell in curves.cells]
    rows = [[verdicts[cell.name] for cell in curves.cells if cell.note.row == row] for row in curves.rows]
    level = min((worst_level(row) for row in rows), key=LEVELS.index)
    verdict = Verdict(level=level, sentence=sentence, reasons=tuple(reasons))
    return Lead(
        f"{preset}: {TITLE}", verdict, {"curve": "Each metric over steps and seconds; bands are 95 % intervals"}
    )


def write_curve_table(cells: Path, out: Path, rows: Sequence[str], preset: str, command: str) -> None:
    """Write index.html, table.md, table.csv, curve_table.json and the plot curve.

    Raises:
        InputError: The cells cannot be read or compared, or `out` cannot be written.
    """
    curves = read_curves(cells, rows)
    variants = variants_over_seeds(curves.cells, {row: curve.title for row, curve in curves.rows.items()})
    markdown, summary = to_markdown(curves, preset, command, variants), to_json(curves, preset, command, variants)
    plots = {"curve": lambda axis: draw_curves(axis, curves)}
    write_table_files(out, "curve_table", make_lead(curves, preset), markdown, _numbers(curves), summary, plots)
