"""Drawn images and metrics -> the pictures that people look at."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from stages.evaluate.table import HEADER, metrics_to_rows

COLUMNS, ROWS = 6, 8
GAP_PIXELS = 2


def images_to_grid(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lay the first images out in a grid: [N, C, H, W] -> [rows·(H + gap) + gap, columns·(W + gap) + gap, C]."""
    _, channels, height, width = pixels.shape
    shape = (ROWS * (height + GAP_PIXELS) + GAP_PIXELS, COLUMNS * (width + GAP_PIXELS) + GAP_PIXELS, channels)
    grid = np.full(shape, 128, dtype=np.uint8)
    for index, image in enumerate(pixels[: ROWS * COLUMNS]):
        row, column = divmod(index, COLUMNS)
        top, left = GAP_PIXELS + row * (height + GAP_PIXELS), GAP_PIXELS + column * (width + GAP_PIXELS)
        grid[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return grid


def write_grid(pixels: NDArray[np.uint8], path: Path, scale: int = 3) -> None:
    """Write a grid as PNG, each pixel enlarged `scale` times."""
    grid = images_to_grid(pixels)
    image = Image.fromarray(grid[..., 0] if grid.shape[2] == 1 else grid)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)


def write_summary(metrics: Mapping[str, Mapping[str, Any]], drawn: Mapping[str, NDArray[np.uint8]], path: Path) -> None:
    """Write the grids of all models side by side, with the results table below them."""
    with mpl.rc_context({"font.size": 11, "figure.dpi": 110}):
        figure = Figure(figsize=(4 * len(drawn), 7.2), layout="constrained")
        pictures, table = figure.subfigures(2, 1, squeeze=False, height_ratios=[5, 1.1])[:, 0]
        for axis, (name, pixels) in zip(pictures.subplots(1, len(drawn), squeeze=False)[0], drawn.items(), strict=True):
            grid = images_to_grid(pixels)
            axis.imshow(grid if grid.shape[2] == 3 else grid[..., 0], cmap="gray", vmin=0, vmax=255)  # noqa: PLR2004
            axis.set_title(name)
            axis.axis("off")
        axis = table.subplots()
        axis.axis("off")
        cells = axis.table(metrics_to_rows(metrics), colLabels=HEADER, loc="center", cellLoc="center")
        cells.auto_set_font_size(value=False)
        cells.set_fontsize(11)
        cells.scale(1, 1.6)
        figure.savefig(path, metadata={"Software": None})
