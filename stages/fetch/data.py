"""An image source -> packed uint8 images of the model's size, or their latents, split into training and held-out.

Images are streamed in blocks, so that memory does not limit their number.
"""

import hashlib
from collections import Counter
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

from stages.data.images import Conditions, Table, write_stream
from stages.fetch.classes import check_labels, with_classes
from stages.fetch.listing import Listing, escape_name, list_folder, sort_names
from stages.fetch.omissions import passed_over_line, shown_line
from stages.fetch.params import BundledData, DataSource, FitParams, FolderData, HubData, NpzData, S3Data
from stages.fetch.source_images import (
    MODES,
    CorruptImageError,
    Pixels,
    Shape,
    SourceImages,
    open_folder,
    open_hub,
    open_npz,
    read_image,
)
from stages.fetch.split import Rows, split_source
from stages.runtime.errors import InputError, warn
from stages.runtime.paths import expand_path
from stages.runtime.progress import track
from stages.storage.s3 import Store
from stages.storage.tensors import write_blocks

BLOCK_SIZE, ENCODE_BATCH_SIZE = 256, 16
"""Images in memory at once, and images per call of the encoder."""
MAX_LISTED = 3
"""Corrupt images named in a message."""

Encode = Callable[[Pixels], NDArray[np.float16]]


def fetch_data(
    source: DataSource,
    shape: tuple[int, ...],
    heldout: float,
    out: Path,
    *,
    table: Table | None = None,
    encode: Encode | None = None,
) -> None:
    """Pack the images of `source` into the folder `out`.

    Args:
        source: Where the images come from.
        shape: Number of channels, height and width of the packed images; without a width they are square.
        heldout: Share of the images that is held out, unless the source has held-out images of its own.
        out: An empty folder; temporary files are created in it, too.
        table: [K, S, D] float32, the conditions of a class-conditional model, the unconditional one last. The source
            must give each image a class in 0 … K − 2. None for an unconditional model, whose source has no classes.
        encode: uint8 [n, C, H, W] -> float16 latents [n, c, h, w], packed beside the training pixels; None for pixels.

    Raises:
        InputError: There are no images, they do not fit the model, or their hash is not the expected one.
    """
    shape = shape[0], shape[1], shape[-1]
    if shape[0] not in MODES:
        raise InputError(f"the model has {shape[0]} image channels; supported: 1 or 3")
    with TemporaryDirectory(dir=out, prefix=".packing.") as place:
        reader = BlockReader(shape, source if isinstance(source, FitParams) else FitParams())
        with open_source(source, shape, Path(place)) as images:
            check_labels(images, table)
            write_blocks(Path(place) / "pixels.npy", reader.blocks(images))
        reader.check_any(images)
        about = {"source": source.model_dump(mode="json"), **reader.describe(images)}
        _check_sha256(source, about["sha256"])
        rows = split_source(images, reader.kept, heldout)
        pixels = np.load(Path(place) / "pixels.npy", mmap_mode="r", allow_pickle=False)
        arrays = {name: _blocks(pixels, chosen, name, encode) for name, chosen in rows.items()}
        if encode:
            arrays["pixels"] = _blocks(pixels, rows["train"], "pixels")
        write_stream(out, arrays, _conditions(images, reader.kept, rows, table), about)


class BlockReader:
    """Reads source images into blocks of uint8 [B, C, H, W], in their order, and skips a few corrupt ones.

    Args:
        shape: C, H and W.
        params: How images are brought to that size, and how many may be corrupt.
    """

    def __init__(self, shape: Shape, params: FitParams) -> None:
        self.shape, self.params = shape, params
        self.digest = hashlib.sha256()
        self.kept = list[int]()
        """Indices of the images that were read."""
        self.corrupt = dict[int, str]()
        """Index of each skipped image -> the reason."""
        self.remarks = Counter[str]()
        """What was found in the images -> the number of images."""

    def blocks(self, images: SourceImages) -> Iterator[Pixels]:
        """Yield the readable images.

        Raises:
            InputError: An image has the wrong size, or too many are corrupt.
        """
        with ThreadPoolExecutor() as pool:
            read = track(self._read(images, pool), "pack, image", len(images))
            while batch := list(islice(read, BLOCK_SIZE)):
                found = [image for image in batch if image is not None]
                block = np.array(found, np.uint8).reshape(-1, *self.shape)
                self.digest.update(block.data)
                yield block

    def _read(self, images: SourceImages, pool: ThreadPoolExecutor) -> Iterator[Pixels | None]:
        read = partial(_read_or_error, images, self.shape, self.params)
        for begin in range(0, len(images), BLOCK_SIZE):  # pool.map submits all of its tasks at once
            indices = range(begin, min(begin + BLOCK_SIZE, len(images)))
            for index, found in zip(indices, pool.map(read, indices), strict=True):
                if isinstance(found, CorruptImageError):
                    self._skip(index, str(found))
                    yield None
                else:
                    pixels, remarks = found
                    self.kept.append(index)
                    self.remarks.update(remarks)
                    yield pixels

    def _skip(self, index: int, reason: str) -> None:
        self.corrupt[index] = reason
        if len(self.corrupt) > self.params.max_corrupt:
            count = f"{len(self.corrupt)} of the first {index + 1} images are corrupt"
            limit = f"fetch.data.max_corrupt allows {self.params.max_corrupt}"
            raise InputError(f"{self._reasons()}: {count}, {limit}; replace or remove them, or raise max_corrupt")

    def check_any(self, images: SourceImages) -> None:
        """Check that an image was read.

        Raises:
            InputError: All are corrupt.
        """
        if not self.kept:
            found = f"none of the {len(images)} images in {images.origin} is readable"
            raise InputError(f"{found}; {self._reasons()}; replace them or correct fetch.data")

    def _reasons(self) -> str:
        reasons = list(self.corrupt.values())
        return "; ".join(reasons[:MAX_LISTED] + ["…"] * (len(reasons) > MAX_LISTED))

    def describe(self, images: SourceImages) -> dict[str, Any]:
        """Describe what was packed, for dataset.json, and print one line about each kind of omission."""
        about: dict[str, Any] = {"sha256": self.digest.hexdigest(), **images.about}
        if images.about:
            click.echo(passed_over_line(images), err=True)
        if self.remarks:
            about["shown"] = dict(self.remarks)
            click.echo(shown_line(images, self.remarks, self.params), err=True)
        if images.classes:
            about["classes"] = list(map(escape_name, images.classes))
        if self.corrupt:
            about["left_out"] = [escape_name(images.names[index]) for index in self.corrupt]
            more = f", of which {MAX_LISTED} are named here" * (len(self.corrupt) > MAX_LISTED)
            warn(f"{len(self.corrupt)} of {len(images)} images are corrupt and left out{more}")
            for reason in list(self.corrupt.values())[:MAX_LISTED]:
                warn(reason)
        return about


def _read_or_error(
    images: SourceImages, shape: Shape, params: FitParams, index: int
) -> tuple[Pixels, list[str]] | CorruptImageError:
    try:
        return read_image(images, index, shape, params)
    except CorruptImageError as error:
        return error


def _blocks(pixels: Pixels, rows: Rows, label: str, encode: Encode | None = None) -> Iterator[NDArray[Any]]:
    size = ENCODE_BATCH_SIZE if encode else BLOCK_SIZE
    begins = range(0, len(rows), size)
    for begin in track(begins, f"{'encode' if encode else 'write'} {label}, {size} images", len(begins)):
        block = np.asarray(pixels[rows[begin : begin + size]])
        yield encode(block) if encode else block


def _conditions(images: SourceImages, kept: list[int], rows: dict[str, Rows], table: Table | None) -> Conditions | None:
    if table is None or images.labels is None:
        return None
    labels = images.labels[kept]
    return Conditions(table, labels[rows["train"]], labels[rows["heldout"]])


def _check_sha256(source: DataSource, sha256: str) -> None:
    if isinstance(source, FolderData | NpzData | S3Data) and source.sha256 not in (None, sha256):
        origin = source.uri if isinstance(source, S3Data) else source.path
        found = f"the images of {origin} have sha256 {sha256}, expected {source.sha256}"
        raise InputError(f"{found}; restore the images or correct fetch.data.sha256")


@contextmanager
def open_source(source: DataSource, shape: Shape, place: Path) -> Iterator[SourceImages]:
    """Yield the images of a source for a model of the shape [C, H, W]; other files are stored in the folder `place`.

    Raises:
        InputError: The source is missing or damaged, or has no images.
    """
    match source:
        case BundledData():
            yield _open_digits(shape)
        case FolderData():
            folder = expand_path(source.path, "fetch.data.path")
            listing = list_folder(folder, str(folder))
            yield _open_folder(source, folder, str(folder), listing)
        case S3Data():
            store = Store(source.uri)
            listing = sort_names(store.paths())
            with store.downloaded_paths(listing.images, place) as folder:
                yield _open_folder(source, folder, store.uri, listing)
        case NpzData():
            yield open_npz(source, place)
        case HubData():
            yield open_hub(source)


def _open_folder(source: FolderData | S3Data, folder: Path, origin: str, listing: Listing) -> SourceImages:
    images = open_folder(folder, origin, listing)
    names_path = expand_path(source.classes, "fetch.data.classes") if source.classes else None
    return with_classes(images, listing, names_path) if source.labels else images


def _open_digits(shape: Shape) -> SourceImages:
    digits = bundled_digits()
    if shape != (1, 16, 16):
        raise InputError(f"the digits are 1×16×16, the model expects {'×'.join(map(str, shape))}; change fetch.data")
    names = [str(index) for index in range(len(digits))]
    return SourceImages("digits", names, lambda index: Image.fromarray(digits[index, 0]))


def bundled_digits() -> Pixels:
    """Scikit-learn's UCI digits, 8×8 with 17 grey levels, enlarged bilinearly: [1797, 1, 16, 16] uint8."""
    small = torch.from_numpy(load_digits().images).float()[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
    pixels: Pixels = large.round().to(torch.uint8).numpy()
    return pixels
