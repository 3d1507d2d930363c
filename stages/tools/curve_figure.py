"""A recovery comparison -> one figure: each metric over steps and over seconds, with bands for the intervals."""

from typing import cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator

from stages.report.figures import plain_log
from stages.report.legend import legend_above
from stages.tools.curves import SECONDS, SHOWN, Curve, Curves

WIDTH_INCHES, ROW_INCHES = 4.4, 2.8
LOGARITHMIC = ("fid", "fid_dense")


def draw_curves(axis: Axes, curves: Curves) -> None:
    """Replace the axis of a figure by a grid: a row for each metric, columns for steps and, if measured, seconds."""
    figure = cast("Figure", axis.figure)
    axis.remove()
    is_timed = any(curve.estimate(step, SECONDS) for curve in curves.rows.values() for step in curve.steps)
    columns = ["steps", "seconds"] if is_timed else ["steps"]
    figure.set_size_inches(WIDTH_INCHES * len(columns), ROW_INCHES * len(curves.metrics))
    grid = figure.subplots(len(curves.metrics), len(columns), squeeze=False)
    for row, name in zip(grid, curves.metrics, strict=True):
        for panel, column in zip(row, columns, strict=True):
            panel.set_axisbelow(True)
            _draw_panel(panel, curves, name, column)
    legend_above(grid[0][0])


def _draw_panel(panel: Axes, curves: Curves, name: str, column: str) -> None:
    for colour, curve in zip(_palette(len(curves.rows)), curves.rows.values(), strict=True):
        places, means, widths = _line(curve, name, column)
        panel.plot(places, means, "o-", markersize=3, color=colour, label=curve.title)
        panel.fill_between(places, means - widths, means + widths, color=colour, alpha=0.15, linewidth=0)
    panel.set(xlabel="optimiser steps" if column == "steps" else "seconds of training", ylabel=SHOWN[name].title)
    panel.set_xscale("log")
    if name in LOGARITHMIC:
        plain_log(panel)
    if column == "steps":
        panel.set_xticks(curves.baseline.steps, [str(step) for step in curves.baseline.steps])
        panel.xaxis.set_minor_locator(NullLocator())
    else:
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())


def _line(curve: Curve, name: str, column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return places, means and half-widths of the steps that have both."""
    rows = []
    for step in curve.steps:
        found, seconds = curve.estimate(step, name), curve.estimate(step, SECONDS)
        place = step if column == "steps" else seconds and seconds.mean
        if found and place:
            rows.append((place, found.mean * SHOWN[name].factor, (found.half_width or 0) * SHOWN[name].factor))
    places, means, widths = np.array(rows, dtype=float).reshape(-1, 3).T
    return places, means, widths


def _palette(count: int) -> list[str]:
    """Return a colour for each recipe; they repeat after eighteen."""
    colours = [*mpl.color_sequences["Dark2"], *mpl.color_sequences["tab10"]]
    return [str(mpl.colors.to_hex(colours[index % len(colours)])) for index in range(count)]
