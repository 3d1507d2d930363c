"""Images -> one PNG that shows them in a grid."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

COLUMNS = 6
GAP_PIXELS = 2
SMALLEST_SIDE, LARGEST_SIDE = 48, 128
"""Limits of an image's side in the PNG, in pixels: large enough to see, small enough for a page of dozens."""


def images_to_grid(pixels: NDArray[np.uint8], columns: int = COLUMNS) -> NDArray[np.uint8]:
    """Arrange images in reading order: [N, C, H, W] -> [rows·(H + gap) + gap, columns·(W + gap) + gap, C]."""
    count, channels, height, width = pixels.shape
    rows = -(-count // columns)
    shape = (rows * (height + GAP_PIXELS) + GAP_PIXELS, columns * (width + GAP_PIXELS) + GAP_PIXELS, channels)
    grid = np.full(shape, 128, dtype=np.uint8)
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        top, left = GAP_PIXELS + row * (height + GAP_PIXELS), GAP_PIXELS + column * (width + GAP_PIXELS)
        grid[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return grid


def write_grid(pixels: NDArray[np.uint8], path: Path, columns: int = COLUMNS) -> None:
    """Write a grid of images [N, C, H, W] as PNG, with small images enlarged and large ones reduced."""
    side = max(pixels.shape[2:])
    grid = images_to_grid(pixels, columns)
    image = Image.fromarray(grid[..., 0] if grid.shape[2] == 1 else grid)
    if side <= LARGEST_SIDE:
        scale = max(1, -(-SMALLEST_SIDE // side))
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    else:
        scale = LARGEST_SIDE / side
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    image.save(path)
