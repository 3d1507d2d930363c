"""A recovery comparison -> one figure: each metric over steps and over seconds, with bands for the intervals."""

import math
from typing import cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator, SymmetricalLogLocator

from stages.report.figures import LABELLED, plain_log
from stages.report.legend import legend_above
from stages.tools.comparison.curves import SECONDS, SHOWN, Curve, Curves

COLUMNS, WIDTH_INCHES, ROW_INCHES = 2, 4.4, 2.8
LOGARITHMIC = ("fid", "fid_dense", "ssim")
DISTANCE_FROM_ONE = {"ssim": "1 − SSIM"}
"""Metric -> label of its axis, where the distance from 1 is drawn: on a logarithmic axis good models stay apart."""
LINEAR_KID = 10
"""KID × 10³ below which its axis is linear, for it may be negative; above, it is logarithmic, as all of it is if no
mean is below."""


def draw_curves(axis: Axes, curves: Curves) -> None:
    """Replace the axis of a figure by panels: each metric over steps and, if measured, over seconds beside it."""
    figure = cast("Figure", axis.figure)
    axis.remove()
    is_timed = any(curve.estimate(step, SECONDS) for curve in curves.rows.values() for step in curve.steps)
    plots = [(name, column) for name in curves.metrics for column in ("steps", "seconds")[: 1 + is_timed]]
    rows = math.ceil(len(plots) / COLUMNS)
    figure.set_size_inches(WIDTH_INCHES * COLUMNS, ROW_INCHES * rows)
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flatten().tolist()
    for panel, (name, column) in zip(panels, plots, strict=False):
        _draw_panel(panel, curves, name, column)
    for panel in panels[len(plots) :]:
        panel.remove()
    legend_above(panels[0])


def _draw_panel(panel: Axes, curves: Curves, name: str, column: str) -> None:
    panel.set_axisbelow(True)
    panel.set_xscale("log")
    lines = [_line(curve, name, column) for curve in curves.rows.values()]
    lowest = min((mean for _, means, _ in lines for mean in means), default=0.0)
    if name in LOGARITHMIC or lowest > LINEAR_KID:
        plain_log(panel)
    else:
        panel.set_yscale("symlog", linthresh=LINEAR_KID)
        panel.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=LINEAR_KID, subs=LABELLED))
        panel.yaxis.set_major_formatter("{x:g}")
    for colour, curve, (places, means, widths) in zip(_palette(len(lines)), curves.rows.values(), lines, strict=True):
        panel.plot(places, means, "o-", markersize=3, color=colour, label=curve.title)
        panel.fill_between(places, means - widths, means + widths, color=colour, alpha=0.15, linewidth=0)
    title = DISTANCE_FROM_ONE.get(name, SHOWN[name].title)
    panel.set(xlabel="optimiser steps" if column == "steps" else "seconds of training", ylabel=title)
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
            factor, mean = SHOWN[name].factor, 1 - found.mean if name in DISTANCE_FROM_ONE else found.mean
            rows.append((place, mean * factor, (found.half_width or 0) * factor))
    places, means, widths = np.array(rows, dtype=float).reshape(-1, 3).T
    return places, means, widths


def _palette(count: int) -> list[str]:
    """Return a colour for each recipe; they repeat after eighteen."""
    colours = [*mpl.color_sequences["Dark2"], *mpl.color_sequences["tab10"]]
    return [str(mpl.colors.to_hex(colours[index % len(colours)])) for index in range(count)]
