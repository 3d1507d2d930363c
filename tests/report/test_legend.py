"""Legends stand above the plots."""

import ast

import pytest
from matplotlib.figure import Figure

from stages.report.legend import legend_above
from tests.servers import ROOT


@pytest.mark.parametrize("labels", [["dense", "kept"], [f"diff-pruning T = .{number:02}" for number in range(19)]])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_legend_covers_nothing(labels, rows):
    """Neither a plot nor its labels, and it lies within the figure, however many entries it has."""
    figure = Figure(figsize=(4.8, 3.1), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
    for label in labels:
        axes[0].plot([0, 1], [0, 1], label=label)
    legend = legend_above(axes[0])
    figure.draw_without_rendering()
    box = legend.get_window_extent()

    assert not any(box.overlaps(axis.get_tightbbox()) for axis in axes)
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert box.y1 <= figure.bbox.y1
    assert min(axis.bbox.height for axis in axes) > 0.6 * 3.1 * figure.dpi / rows


def test_a_plot_without_labels_has_no_legend():
    """Nothing to name: all its settings were left out."""
    assert legend_above(Figure(layout="constrained").subplots()) is None


def test_every_legend_is_written_there():
    """No code of stages puts a legend onto a plot itself."""
    calls = [
        path.name
        for path in (ROOT / "stages").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "legend"
    ]

    assert calls == ["legend.py"]
