"""Grids of pictures and the SSIM of each pair -> where each picture lies, for the page's slider and zoom."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stages.data.grid import COLUMNS
from stages.protocol.evaluation import DENSE, SHOWN, EvaluationRecord
from stages.report.report_data import ReportData

GREY = 128
"""Colour of the lines between the pictures of a grid."""
Box = tuple[float, float, float, float]
"""Left, top, width and height in pixels of the grid's PNG."""


def find_cells(path: Path, columns: int, count: int) -> list[Box]:
    """Find the places of the pictures in a grid, in reading order.

    The lines between the pictures are as wide as the border, which is measured.
    """
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    height, width = pixels.shape
    line = int(np.argmin(np.append((pixels == GREY).all(axis=0), False)))  # the value appended
    rows = -(-count // columns)
    across, down = (width - line) / columns, (height - line) / rows
    places = (divmod(index, columns) for index in range(count))
    return [(line + column * across, line + row * down, across - line, down - line) for row, column in places]


def describe_pairs(report: ReportData, reports: Path) -> dict[str, Any]:
    """Describe the pairs of each model with the dense one: in the grids, and the least similar ones.

    Returns:
        Model -> name of a picture -> for each pair its title, its box in the picture of the dense model and in that of
        the model.
    """
    folder, others = reports / "evaluate", [name for name in report.record.models if name != DENSE]
    return {
        name: {
            name: _grid_pairs(report.ssim[name], folder / f"{name}.png", report.record),
            f"{name}-worst": _worst_pairs(report.record, name, folder / f"{name}-worst.png"),
        }
        for name in others
    }


def _grid_pairs(ssim: Sequence[float], path: Path, record: EvaluationRecord) -> list[dict[str, Any]]:
    boxes = find_cells(path, COLUMNS, min(record.protocol.num_images, SHOWN))
    return [
        {"title": f"pair {index + 1}, SSIM {ssim[index]:.2f}", "dense": box, "model": box}
        for index, box in enumerate(boxes)
    ]


def _worst_pairs(record: EvaluationRecord, name: str, path: Path) -> list[dict[str, Any]]:
    worst = record.models[name].worst_pairs
    boxes = find_cells(path, len(worst), 2 * len(worst))
    return [
        {"title": f"set {pair.set + 1}, image {pair.index + 1}, SSIM {pair.ssim:.2f}", "dense": above, "model": below}
        for pair, above, below in zip(worst, boxes, boxes[len(worst) :], strict=False)
    ]
