"""The labels of an axis -> a legend above the plot, where it covers nothing."""

from typing import cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend

SIZE_POINTS = 8
GLYPH, HANDLE = 0.56, 6.5
"""Width of a letter, and of a handle with its gaps, in font sizes."""
LINE = 1.6
"""Height of a row in font sizes."""
POINTS_PER_INCH = 72


def legend_above(axis: Axes) -> Legend | None:
    """Write the labels of an axis above all plots of its figure, in as many columns as its width holds.

    The figure grows by the rows of the legend, so the plots keep their size. It needs the constrained layout; without
    labels there is no legend.
    """
    figure = cast("Figure", axis.figure)
    handles, labels = axis.get_legend_handles_labels()
    if not labels:
        return None
    width, height = figure.get_size_inches()
    longest = max(map(len, labels)) * GLYPH + HANDLE
    columns = max(1, min(len(labels), int(width * POINTS_PER_INCH / (SIZE_POINTS * longest))))
    rows = -(-len(labels) // columns)
    figure.set_size_inches(width, height + rows * LINE * SIZE_POINTS / POINTS_PER_INCH)
    return figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=SIZE_POINTS)
