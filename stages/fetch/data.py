"""A data source -> packed uint8 images of the model's size, or their latents, in a training and a held-out split.

Images pass one after the other: as many as a disk holds can be packed, whatever the memory.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from stages.data.images import Conditions, Images, write_stream
from stages.fetch.params import BundledSource, DataSource, Fitted, FolderData, HubData, NpzData, S3Data, locate
from stages.fetch.pictures import (
    MODES,
    SUFFIXES,
    CorruptError,
    Pictures,
    Pixels,
    open_folder,
    open_hub,
    open_npz,
    read_picture,
)
from stages.runtime.errors import InputError
from stages.runtime.progress import track
from stages.runtime.seeds import generator
from stages.storage.s3 import Store
from stages.storage.tensors import write_blocks

SPLIT_SEED = 0
"""The split never moves, whatever params.yaml says of the seed: held-out losses of all runs compare."""
BLOCK, ENCODED_AT_ONCE = 256, 16
"""Images that are in memory at a time, and those of them that an encoder takes."""
FEW = 3
"""Names in a message."""

Shape = tuple[int, int]
"""Channels and size of square pixels."""
Rows = NDArray[np.int64]
Encode = Callable[[Pixels], NDArray[np.float16]]


def check_there(source: DataSource) -> None:
    """Find a mistake in a path before a model is fetched for nothing.

    Raises:
        InputError: A variable of the path is not set, or nothing is there.
    """
    if isinstance(source, FolderData | NpzData):
        path = locate(source.path, "fetch.data.path")
        if not path.exists():
            what = "image folder" if isinstance(source, FolderData) else "file"
            raise InputError(f"{what} {path} does not exist; correct fetch.data.path in params.yaml")


def fetch_data(
    source: DataSource,
    shape: Shape,
    heldout: float,
    out: Path,
    *,
    table: NDArray[np.float32] | None = None,
    encode: Encode | None = None,
) -> None:
    """Pack the images of `source` into the folder `out`.

    Args:
        source: Where they come from.
        shape: Channels and size that the pictures are brought to.
        heldout: Share that is set aside, unless the source does that itself.
        out: An empty folder; what is needed on the way lies there, too.
        table: [K, S, D], the conditions of a class-conditional model, the last row for none. The source must give
            each image a class in 0 … K − 2; without a table it must give none.
        encode: uint8 [n, C, H, W] -> float16 latents [n, c, h, w], for a model of latents: these are packed in place
            of the pixels, of which the training images are kept beside.

    Raises:
        InputError: There are no images, or they do not fit the model, or they are not the ones asked for.
    """
    if shape[0] not in MODES:
        raise InputError(f"the model draws {shape[0]} channels; images have 1 or 3")
    with TemporaryDirectory(dir=out, prefix=".packing.") as place:
        packing = Packing(shape, source if isinstance(source, Fitted) else Fitted())
        with _opened(source, shape, Path(place)) as pictures:
            _check_labels(pictures, table)
            write_blocks(Path(place) / "pixels.npy", packing.blocks(pictures))
        about = {"source": source.model_dump(mode="json"), **packing.describe(pictures)}
        _check_sha256(source, about["sha256"])
        rows = _rows(pictures, packing.kept, heldout)
        pixels = np.load(Path(place) / "pixels.npy", mmap_mode="r", allow_pickle=False)
        arrays = {name: _blocks(pixels, chosen, name, encode) for name, chosen in rows.items()}
        if encode:
            arrays["pixels"] = _blocks(pixels, rows["train"], "pixels")
        write_stream(out, arrays, _conditions(pictures, packing.kept, rows, table), about)


class Packing:
    """Pictures -> blocks of uint8 [B, C, S, S], in their order; a few that are corrupt are left out.

    Args:
        shape: C and S.
        how: How they are fitted, and how many may be corrupt.
    """

    def __init__(self, shape: Shape, how: Fitted) -> None:
        self.shape, self.how = shape, how
        self.digest, self.kept = hashlib.sha256(), list[int]()
        self.faults: dict[int, str] = {}

    def blocks(self, pictures: Pictures) -> Iterator[Pixels]:
        """Give all that can be read.

        Raises:
            InputError: A picture is of the wrong size, or too many are corrupt.
        """
        channels, size = self.shape
        with ThreadPoolExecutor() as pool:
            read = track(self._read(pictures, pool), "pack, image", len(pictures))
            while turn := list(islice(read, BLOCK)):
                found = [picture for picture in turn if picture is not None]
                block = np.array(found, np.uint8).reshape(-1, channels, size, size)
                self.digest.update(block.data)
                yield block

    def _read(self, pictures: Pictures, pool: ThreadPoolExecutor) -> Iterator[Pixels | None]:
        read = partial(_try, pictures, self.shape, self.how)
        for begin in range(0, len(pictures), BLOCK):  # a pool takes all it is given at once
            indices = range(begin, min(begin + BLOCK, len(pictures)))
            for index, found in zip(indices, pool.map(read, indices), strict=True):
                if isinstance(found, CorruptError):
                    self._leave_out(index, str(found))
                    yield None
                else:
                    self.kept.append(index)
                    yield found

    def _leave_out(self, index: int, fault: str) -> None:
        self.faults[index] = fault
        if len(self.faults) > self.how.max_corrupt:
            count = f"{len(self.faults)} of the first {index + 1} images are corrupt"
            limit = f"fetch.data.max_corrupt allows {self.how.max_corrupt}"
            raise InputError(
                f"{_few(list(self.faults.values()))}: {count}, {limit}; replace or remove them, or allow more"
            )

    def describe(self, pictures: Pictures) -> dict[str, Any]:
        """Say what was packed, and warn of what was left out."""
        about: dict[str, Any] = {"sha256": self.digest.hexdigest()}
        if pictures.classes:
            about["classes"] = list(pictures.classes)
        if self.faults:
            about["left_out"] = [pictures.names[index] for index in self.faults]
            count = f"{len(self.faults)} of {len(pictures)} images are corrupt and left out"
            click.echo(f"Warning: {count}: {_few(list(self.faults.values()))}", err=True)
        return about


def _try(pictures: Pictures, shape: Shape, how: Fitted, index: int) -> Pixels | CorruptError:
    try:
        return read_picture(pictures, index, shape, how)
    except CorruptError as error:
        return error


def _few(faults: list[str]) -> str:
    return "; ".join(faults[:FEW] + ["…"] * (len(faults) > FEW))


def split(pixels: NDArray[Any], heldout: float) -> Images:
    """Set a share of the images aside, always the same ones for the same images.

    Raises:
        InputError: A split would be empty.
    """
    rows = split_rows(len(pixels), heldout)
    return Images(train=pixels[rows["train"]], heldout=pixels[rows["heldout"]])


def split_rows(num_images: int, heldout: float) -> dict[str, Rows]:
    """Choose which of so many images are for training and which are held out, ascending.

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


def _rows(pictures: Pictures, kept: list[int], heldout: float) -> dict[str, Rows]:
    if not pictures.num_heldout:
        return split_rows(len(kept), heldout)
    is_heldout = np.array(kept) >= len(pictures) - pictures.num_heldout
    return {"train": np.flatnonzero(~is_heldout), "heldout": np.flatnonzero(is_heldout)}


def _blocks(pixels: Pixels, rows: Rows, label: str, encode: Encode | None = None) -> Iterator[NDArray[Any]]:
    size = ENCODED_AT_ONCE if encode else BLOCK
    begins = range(0, len(rows), size)
    for begin in track(begins, f"{'encode' if encode else 'write'} {label}, {size} images", len(begins)):
        block = np.asarray(pixels[rows[begin : begin + size]])
        yield encode(block) if encode else block


def _conditions(
    pictures: Pictures, kept: list[int], rows: dict[str, Rows], table: NDArray[np.float32] | None
) -> Conditions | None:
    if table is None or pictures.labels is None:
        return None
    labels = pictures.labels[kept]
    return Conditions(table, labels[rows["train"]], labels[rows["heldout"]])


def _check_labels(pictures: Pictures, table: NDArray[np.float32] | None) -> None:
    """Make sure that a model which is told a class gets one with each image, and another none.

    Raises:
        InputError: It is not so.
    """
    labels = pictures.labels
    if table is None:
        if labels is not None:
            raise InputError("fetch.data.labels gives classes and the model takes none; remove it")
        return
    num_classes = len(table) - 1
    if labels is None:
        found = f"{pictures.origin} gives no classes and the model takes one of {num_classes} with each image"
        raise InputError(f"{found}; set fetch.data.labels, or choose a source that has them")
    if wrong := [int(label) for label in (labels.min(), labels.max()) if not 0 <= label < num_classes]:
        found = f"{pictures.origin} gives the class {wrong[0]}, the model takes 0 to {num_classes - 1}"
        raise InputError(f"{found}; correct fetch.data.labels or the images")
    if pictures.classes and len(pictures.classes) != num_classes:
        found = f"{pictures.origin} has {len(pictures.classes)} classes, the model {num_classes}"
        raise InputError(f"{found}; they are numbered in order, so give all of them")


def _check_sha256(source: DataSource, sha256: str) -> None:
    if isinstance(source, FolderData | NpzData | S3Data) and source.sha256 not in (None, sha256):
        home = source.uri if isinstance(source, S3Data) else source.path
        wrong = f"the images of {home} have sha256 {sha256}, expected {source.sha256}"
        raise InputError(f"{wrong}; bring back the images or correct fetch.data.sha256")


@contextmanager
def _opened(source: DataSource, shape: Shape, place: Path) -> Iterator[Pictures]:
    """Give the pictures of a source; what must be downloaded or unpacked first lies in `place`."""
    match source:
        case BundledSource():
            yield _open_digits(shape)
        case FolderData():
            folder = locate(source.path, "fetch.data.path")
            yield open_folder(folder, str(folder), labels=source.labels)
        case S3Data():
            store = Store(source.uri)
            with store.downloaded([f"*{suffix}" for suffix in sorted(SUFFIXES)], place) as folder:
                yield open_folder(folder, store.uri, labels=source.labels)
        case NpzData():
            yield open_npz(source, place)
        case HubData():
            yield open_hub(source)


def _open_digits(shape: Shape) -> Pictures:
    digits = bundled_digits()
    if shape != (1, 16):
        channels, size = shape
        raise InputError(f"the digits are 1×16×16, the model draws {channels}×{size}×{size}; choose fetch.data")
    names = [str(index) for index in range(len(digits))]
    return Pictures("digits", names, lambda index: Image.fromarray(digits[index, 0]))


def bundled_digits() -> Pixels:
    """Scikit-learn's UCI digits, 8×8 with 17 grey levels, enlarged bilinearly: [1797, 1, 16, 16] uint8."""
    small = torch.from_numpy(load_digits().images).float()[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
    pixels: Pixels = large.round().to(torch.uint8).numpy()
    return pixels
