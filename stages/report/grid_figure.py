"""A grid -> heatmaps of FID and SSIM: a panel for each model, rows of samplers and guidance, columns of steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from stages.protocol.evaluation import DENSE
from stages.protocol.grid import SSIM, SSIM_PROTOCOL, GridCell, GridRecord, fid_apart
from stages.report.figures import THEMES, draw_figure
from stages.report.table import ALIKE

CELL_INCHES, AROUND_INCHES = (0.8, 0.5), (2.2, 1.3)
"""Width and height of a cell, and of what stands around the panels."""
LIGHT = 0.5
"""Brightness of a cell from which on its number is black."""


@dataclass(frozen=True)
class Panel:
    """One heatmap."""

    title: str
    cells: Sequence[GridCell]
    metric: str
    best: GridCell
    """Gets a frame."""
    alike: Sequence[GridCell] = ()
    """Get the mark of values that are not distinct from the best."""

    def value(self, cell: GridCell) -> float:
        """Return the mean of the metric that the panel shows."""
        return cell.metrics[self.metric].mean


def draw_grid_figures(grid: GridRecord) -> dict[str, dict[str, bytes]]:
    """Draw the figures of a grid: name -> theme -> SVG."""
    return {
        name: {theme: draw_figure(partial(draw, grid=grid), theme) for theme in THEMES} for name, draw in PLOTS.items()
    }


def _draw_fid(axis: Axes, *, grid: GridRecord) -> None:
    """FID of each model."""
    panels = []
    for name in (DENSE, *grid.others):
        best, cells = grid.best(name), grid.of(name)
        alike = [cell for cell in cells if cell is not best and fid_apart(cell, best).is_distinct is False]
        panels.append(Panel(name, cells, "fid", best, alike))
    values = [panel.value(cell) for panel in panels for cell in panel.cells]
    tiny = float(np.finfo(float).tiny)
    _draw_panels(axis, panels, LogNorm(max(min(values), tiny), max(*values, 2 * tiny)), "viridis")


def _draw_ssim(axis: Axes, *, grid: GridRecord) -> None:
    """SSIM of pruned models at equal settings, and of all models against dense under the protocol's own setting."""
    wanted = [(f"{name} against dense,\nsame setting", name, SSIM) for name in grid.others]
    wanted += [(f"{name} against dense\nunder the protocol", name, SSIM_PROTOCOL) for name in (DENSE, *grid.others)]
    panels = [Panel(title, grid.of(name), key, _highest(grid.of(name), key)) for title, name, key in wanted]
    values = [panel.value(cell) for panel in panels for cell in panel.cells]
    _draw_panels(axis, panels, Normalize(min(*values, 0.99), 1), "viridis_r")


def _highest(cells: Sequence[GridCell], metric: str) -> GridCell:
    return max(cells, key=lambda cell: cell.metrics[metric].mean)


def _draw_panels(axis: Axes, panels: Sequence[Panel], norm: Normalize, colours: str) -> None:
    """Replace the axis of a figure by the panels, side by side."""
    figure = cast("Figure", axis.figure)
    axis.remove()
    rows = list(dict.fromkeys(cell.row for cell in panels[0].cells))
    steps = sorted({cell.steps for cell in panels[0].cells})
    width = AROUND_INCHES[0] + CELL_INCHES[0] * len(steps) * len(panels)
    figure.set_size_inches(width, AROUND_INCHES[1] + CELL_INCHES[1] * len(rows))
    places = {(row, step): (y, x) for y, row in enumerate(rows) for x, step in enumerate(steps)}
    for place, target in zip(panels, figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], strict=True):
        _draw_panel(target, place, places, norm, mpl.colormaps[colours])
        target.set_xticks(range(len(steps)), [str(step) for step in steps])
        target.set(xlabel="steps", title=place.title)
        target.title.set_fontsize(9)
    target.set_yticks(range(len(rows)), rows)


def _draw_panel(
    axis: Axes, panel: Panel, places: Mapping[tuple[str, int], tuple[int, int]], norm: Normalize, colours: Colormap
) -> None:
    values = np.full((1 + max(y for y, _ in places.values()), 1 + max(x for _, x in places.values())), np.nan)
    axis.grid(visible=False)
    for cell in panel.cells:
        y, x = places[cell.row, cell.steps]
        values[y, x] = panel.value(cell)
        red, green, blue, _ = colours(norm(panel.value(cell)))
        ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > LIGHT else "white"
        mark = f" {ALIKE}" if cell in panel.alike else ""
        axis.text(x, y, f"{_write(panel.value(cell))}{mark}", ha="center", va="center", color=ink, fontsize=8)
        if cell is panel.best:
            axis.add_patch(Rectangle((x - 0.47, y - 0.44), 0.94, 0.88, fill=False, linewidth=2, edgecolor="#cc4b3e"))
    axis.imshow(values, aspect="auto", norm=norm, cmap=colours)


def _write(value: float) -> str:
    """Format with three digits."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"  # noqa: PLR2004


PLOTS: Mapping[str, Callable[..., None]] = {"fid": _draw_fid, "ssim": _draw_ssim}
CAPTIONS = {
    "fid": "FID; darker is better. In a frame: the best of each model; ≈: cannot be told from it.",
    "ssim": "SSIM of pairs from the same noise; darker is more alike. In a frame: the highest of each panel.",
}
