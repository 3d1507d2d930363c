"""Packed images, latents and conditions: memory-mapped .npy files <-> arrays."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stages.runtime.errors import InputError, first_line
from stages.storage.files import write_json
from stages.storage.tensors import read_array, write_array, write_blocks

SPLITS = ("train", "heldout")
Table = NDArray[np.float32] | NDArray[np.int64]
"""What a conditional model gets for each class, the empty condition last: encoder_hidden_states, float32 [K, S, D], or,
of a model that embeds its classes itself, class_labels, int64 [K]."""
NO_LABEL = -1
"""The last of the class labels of a model that has no empty class."""


def label_table(num_classes: int, empty: int | None) -> NDArray[np.int64]:
    """List the labels of the classes, and last that of the empty class or NO_LABEL: [num_classes + 1]."""
    return np.array([*range(num_classes), NO_LABEL if empty is None else empty], np.int64)


def has_empty(table: Table) -> bool:
    """Whether a table holds an empty condition, which guidance needs."""
    return bool(table[-1] != NO_LABEL if table.ndim == 1 else table[-1].any())


def to_condition(table: torch.Tensor, rows: Any) -> dict[str, torch.Tensor]:  # noqa: ANN401  # any index of a tensor
    """Rows of a table -> keyword arguments of forward, each [B, …]."""
    return {"class_labels" if table.ndim == 1 else "encoder_hidden_states": table[rows]}


def evenly_spaced(count: int, limit: int | None) -> NDArray[np.int64]:
    """Choose at most `limit` of `count` rows, evenly spaced because neighbours may share a class; None chooses all."""
    rows: NDArray[np.int64] = np.linspace(0, count - 1, min(count, limit or count)).round().astype(np.int64)
    return rows


class RowSelection:
    """Lazy row selection over a memory-mapped array; supports len, shape and indexing."""

    def __init__(self, pixels: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
        self.pixels, self.rows = pixels, rows
        self.shape = (len(rows), *pixels.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:  # noqa: ANN401  # keys and results of an array
        return self.pixels[self.rows[key]]


PixelArray = NDArray[np.uint8] | RowSelection
"""Images as uint8 [N, C, H, W]."""


@dataclass(frozen=True)
class Conditions:
    """The conditions of a conditional model: a table of them, such as one per class, and the row of each image."""

    table: Table
    """See `Table`."""
    train: NDArray[np.int64]
    """[N] row of each training image."""
    heldout: NDArray[np.int64]
    """[N] row of each held-out image."""


@dataclass(frozen=True)
class Images:
    """Memory-mapped images, uint8 [N, C, H, W], or latents, float16 or float32 [N, c, h, w], in the model's scale."""

    train: NDArray[Any]
    """Images or latents for calibration and finetuning."""
    heldout: NDArray[Any]
    """Images or latents for validation only."""
    conditions: Conditions | None = None
    """The conditions of both splits; None for an unconditional model."""
    source_pixels: NDArray[np.uint8] | None = None
    """The images that the latents in `train` encode, uint8 [N, C, H, W]; None if `train` holds images."""

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The training images as uint8 [N, C, H, W], the real images of FID and KID."""
        return self.train if self.source_pixels is None else self.source_pixels

    def condition_for(self, chosen: NDArray[np.int64], device: torch.device) -> dict[str, torch.Tensor]:
        """Return the conditions of training images as keyword arguments of forward; empty if unconditional."""
        if self.conditions is None:
            return {}
        rows = torch.from_numpy(np.array(self.conditions.train[chosen]))
        found = to_condition(torch.from_numpy(self.conditions.table), rows)
        return {name: values.to(device) for name, values in found.items()}


def check_num_images(key: str, number: int, num_train: int) -> None:
    """Check that there are as many training images as a key of params.yaml needs.

    Raises:
        InputError: There are fewer.
    """
    if number > num_train:
        raise InputError(f"{key} {number} is more than the {num_train} training images; lower it in params.yaml")


def write_images(folder: Path, images: Images, about: Mapping[str, Any]) -> None:
    """Write images and conditions as .npy files, and dataset.json with `about`, counts and shape."""
    arrays = {split: [getattr(images, split)] for split in SPLITS}
    if images.source_pixels is not None:
        arrays["pixels"] = [images.source_pixels]
    write_stream(folder, arrays, images.conditions, about)


def write_stream(
    folder: Path,
    arrays: Mapping[str, Iterable[NDArray[Any]]],
    conditions: Conditions | None,
    about: Mapping[str, Any],
) -> None:
    """Write the same files as `write_images` from blocks of images, with one block at a time in memory.

    Args:
        folder: An existing folder.
        arrays: The blocks of train and heldout; for latents also of pixels, the training images themselves.
        conditions: The conditions of both splits.
        about: Hash and origin of the images.
    """
    shapes = {name: write_blocks(folder / f"{name}.npy", blocks) for name, blocks in arrays.items()}
    if conditions:
        write_array(folder / "conditions.npy", conditions.table)
        for split in SPLITS:
            write_array(folder / f"{split}_labels.npy", getattr(conditions, split))
    counts = {split: shapes[split][0] for split in SPLITS}
    write_json(folder / "dataset.json", {**about, **counts, "shape": list(shapes["train"][1:])})


def read_images(folder: Path) -> Images:
    """Open the packed images or latents of a folder.

    Raises:
        InputError: A file is missing or damaged.
    """
    train, heldout = (_open(folder, f"{split}.npy") for split in SPLITS)
    for array in (train, heldout):
        is_latent = array.dtype in (np.float16, np.float32)
        if array.ndim != 4 or not array.size or array.shape[1:] != train.shape[1:] or array.dtype != train.dtype:  # noqa: PLR2004
            raise _no_images(folder, "not [N, C, H, W]")
        if array.dtype != np.uint8 and not is_latent:
            raise _no_images(folder, f"{array.dtype}")
    conditions = _read_conditions(folder, {"train": len(train), "heldout": len(heldout)})
    return Images(train, heldout, conditions, _read_source_pixels(folder, train))


def _read_source_pixels(folder: Path, train: NDArray[Any]) -> NDArray[np.uint8] | None:
    if train.dtype == np.uint8:
        return None
    pixels = _open(folder, "pixels.npy")
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or len(pixels) != len(train):  # noqa: PLR2004
        raise _no_images(folder, f"pixels.npy must hold the {len(train)} images whose latents are in train.npy")
    return pixels


def read_table(folder: Path) -> Table | None:
    """Read conditions.npy into memory; None for a folder without it.

    Raises:
        InputError: The file is damaged.
    """
    if not (folder / "conditions.npy").is_file():
        return None
    table = _open(folder, "conditions.npy")
    if (str(table.dtype), table.ndim) not in (("float32", 3), ("int64", 1)):
        allowed = "float32 [K, S, D] or int64 [K]"
        raise InputError(f"{folder}/conditions.npy is not a condition table, {allowed}; write it again")
    return np.array(table)


def _read_conditions(folder: Path, counts: Mapping[str, int]) -> Conditions | None:
    table = read_table(folder)
    if table is None:
        return None
    labels = {split: _open(folder, f"{split}_labels.npy") for split in SPLITS}
    num_rows = len(table) if has_empty(table) else len(table) - 1
    for split, rows in labels.items():
        if rows.dtype != np.int64 or rows.shape != (counts[split],) or not ((rows >= 0) & (rows < num_rows)).all():
            allowed = f"int64 [{counts[split]}] from 0 to {num_rows - 1}"
            found = f"{folder}/{split}_labels.npy does not hold a row of conditions.npy for each image, {allowed}"
            raise InputError(f"{found}; run the fetch stage again")
    return Conditions(table, labels["train"], labels["heldout"])


def _open(folder: Path, name: str) -> NDArray[Any]:
    try:
        return read_array(folder / name)
    except ValueError as error:
        raise _no_images(folder, first_line(error)) from None


def _no_images(folder: Path, why: str) -> InputError:
    return InputError(f"{folder} holds no packed images, uint8 [N, C, H, W] ({why}); run the fetch stage again")


def to_model_range(images: NDArray[Any]) -> torch.Tensor:
    """uint8 [N, C, H, W] -> float32 in [-1, 1]; latents -> float32 with the same values."""
    floats = torch.from_numpy(images.astype(np.float32))
    return floats.div_(127.5).sub_(1) if images.dtype == np.uint8 else floats
