"""The table of variants -> quality against measured time, and against bytes on disk."""

from collections.abc import Callable, Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes

from stages.report.legend import legend_above
from stages.report.variants import VariantRow, pareto_front

NAMED = 24
"""Points with names, at most."""


def draw_time(axis: Axes, rows: Sequence[VariantRow], colours: Mapping[str, str]) -> None:
    """FID over the median time of a step."""
    _draw(axis, [row for row in rows if row.first.median_ms], colours, lambda row: row.first.median_ms or 0.0)
    axis.set(xlabel="milliseconds a step")


def draw_size(axis: Axes, rows: Sequence[VariantRow], colours: Mapping[str, str]) -> None:
    """FID over the bytes on disk."""
    _draw(axis, rows, colours, lambda row: row.size_bytes / 1e6)
    axis.set(xlabel="MB on disk")


def _draw(
    axis: Axes, rows: Sequence[VariantRow], colours: Mapping[str, str], cost: Callable[[VariantRow], float]
) -> None:
    """Draw a point for each row, and the line of those that no other one beats in both."""
    for row in rows:
        fid = row.metrics["fid"]
        is_model = row.name == row.model
        axis.errorbar(
            cost(row),
            fid.mean,
            yerr=fid.half_width,
            fmt="o" if is_model else "^",
            markersize=7 if is_model else 5,
            capsize=2,
            color=colours.get(row.model),
            label=row.model if is_model else None,
        )
        if len(rows) <= NAMED and not is_model:
            name = row.name.partition(" + ")[2]
            axis.annotate(name, (cost(row), fid.mean), (4, 3), textcoords="offset points", fontsize=6)
    front = pareto_front(rows, lambda row: (cost(row), row.metrics["fid"].mean))
    steps = [cost(row) for row in front], [row.metrics["fid"].mean for row in front]
    axis.plot(*steps, drawstyle="steps-post", color=mpl.rcParams["axes.edgecolor"], linewidth=0.8)
    axis.set(ylabel="FID (logarithmic)", xlim=(0, None))
    legend_above(axis)
