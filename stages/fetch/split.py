"""A number of images -> which of them are for training and which are held out."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stages.data.images import Images
from stages.fetch.source_images import SourceImages
from stages.runtime.errors import InputError
from stages.runtime.seeds import generator

SPLIT_SEED = 0
"""The split does not depend on the seed in params.yaml, so that held-out losses of all runs are comparable."""

Rows = NDArray[np.int64]


def split(pixels: NDArray[Any], heldout: float) -> Images:
    """Split images into training and held-out; the split depends only on their number.

    Raises:
        InputError: A split would be empty.
    """
    rows = split_rows(len(pixels), heldout)
    return Images(train=pixels[rows["train"]], heldout=pixels[rows["heldout"]])


def split_rows(num_images: int, heldout: float) -> dict[str, Rows]:
    """Choose the rows of the splits `train` and `heldout`, ascending.

    Raises:
        InputError: A split would be empty.
    """
    num_heldout = round(heldout * num_images)
    if not 0 < num_heldout < num_images:
        raise InputError(
            f"fetch.heldout {heldout} of {num_images} images leaves a split empty; change it or add images"
        )
    order = torch.randperm(num_images, generator=generator(SPLIT_SEED, "heldout")).numpy()
    return {"train": np.sort(order[num_heldout:]), "heldout": np.sort(order[:num_heldout])}


def split_source(images: SourceImages, kept: list[int], heldout: float) -> dict[str, Rows]:
    """Choose the rows of both splits among the packed images, whose indices in the source are `kept`."""
    if not images.num_heldout:
        return split_rows(len(kept), heldout)
    is_heldout = np.array(kept) >= len(images) - images.num_heldout
    return {"train": np.flatnonzero(~is_heldout), "heldout": np.flatnonzero(is_heldout)}


def split_sizes(images: SourceImages, heldout: float) -> tuple[int, int]:
    """Return how many images of a source are for training and how many are held out, if all can be read.

    Raises:
        InputError: A split would be empty.
    """
    rows = split_source(images, list(range(len(images))), heldout)
    return len(rows["train"]), len(rows["heldout"])
