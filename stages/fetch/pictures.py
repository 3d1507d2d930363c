"""A source of images -> its pictures, opened one at a time and fitted to a model."""

import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetsError
from numpy.typing import NDArray
from PIL import Image, ImageOps

from stages.fetch.params import Fitted, HubData, NpzData, locate
from stages.runtime.errors import InputError, UnavailableError, first_line

FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
"""Of Pillow's: others call foreign programs, as EPS does."""
UNREADABLE = (
    EOFError,
    KeyError,
    OSError,
    OverflowError,
    RuntimeError,
    TokenError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What a damaged .npz file ends in."""
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
MODES = {1: "L", 3: "RGB"}
CELEBA_SIZE, CELEBA_FACE = (178, 218), (25, 57, 25 + 128, 57 + 128)
"""Width and height of an aligned image; left, top, right, bottom of what DDIM takes of it."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Pictures:
    """The images of a source, in an order that never changes."""

    origin: str
    """Where they come from, for messages."""
    names: Sequence[str]
    """Of each, below the origin."""
    open: Callable[[int], Image.Image]
    """Gives the picture of an index, read whole, and may fail in any way where it is damaged."""
    labels: NDArray[np.int64] | None = None
    """[N]: the class of each."""
    classes: Sequence[str] | None = None
    """What the classes are called, where they have names."""
    num_heldout: int = 0
    """The last ones are held out by the source itself; 0 leaves it to fetch.heldout."""

    def __len__(self) -> int:
        return len(self.names)


class CorruptError(Exception):
    """A picture cannot be read, or not without loss; the message names it and the reason."""


def read_picture(pictures: Pictures, index: int, shape: tuple[int, int], how: Fitted) -> Pixels:
    """Give one picture as uint8 [C, S, S], for a `shape` of C and S.

    Raises:
        CorruptError: It cannot be read, or has more than 8 bits a channel.
        InputError: It does not have the size that `how` wants.
    """
    channels, size = shape
    name = f"{pictures.origin}/{pictures.names[index]}"
    try:
        image = pictures.open(index)
    except Exception as error:  # noqa: BLE001  # a damaged file can break a decoder anywhere
        raise CorruptError(f"{name} is not a readable image ({first_line(error)})") from None
    if image.mode.startswith(("I", "F")):
        raise CorruptError(f"{name} has more than 8 bits a channel (mode {image.mode})")
    fitted = np.asarray(_fit(image.convert(MODES[channels]), size, how, name))
    return fitted.reshape(size, size, channels).transpose(2, 0, 1)


def _fit(image: Image.Image, size: int, how: Fitted, name: str) -> Image.Image:
    found, resample = f"{name} is {image.width}×{image.height}", Image.Resampling[how.resample.upper()]
    if how.fit == "crop":
        return ImageOps.fit(image, (size, size), resample)
    if how.fit == "celeba":
        if image.size != CELEBA_SIZE:
            raise InputError(f"{found}, aligned CelebA is 178×218; give img_align_celeba or set another fetch.data.fit")
        return image.crop(CELEBA_FACE).resize((size, size), resample)
    if image.size != (size, size):
        raise InputError(f"{found}, the model draws {size}×{size}; resize it or set fetch.data.fit: crop")
    return image


def open_folder(folder: Path, origin: str, *, labels: bool) -> Pictures:
    """Open the images of a folder and of all below it, sorted.

    Args:
        folder: Where they lie.
        origin: What messages call it.
        labels: Whether the folders right below are classes.

    Raises:
        InputError: There is no such folder, no image in it, or one that belongs to no class.
    """
    if not folder.is_dir():
        raise InputError(f"image folder {origin} does not exist; correct fetch.data.path in params.yaml")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise InputError(f"no images found in {origin}; fetch.data wants files with {', '.join(sorted(SUFFIXES))}")
    names = [path.relative_to(folder).as_posix() for path in paths]
    pictures = Pictures(origin, names, lambda index: _load(paths[index]))
    return _with_classes(pictures, [it.name for it in folder.iterdir() if it.is_dir()]) if labels else pictures


def _load(path: Path) -> Image.Image:
    with Image.open(path, formats=FORMATS) as image:
        image.load()
    return image


def _with_classes(pictures: Pictures, folders: Iterable[str]) -> Pictures:
    homes = [name.partition("/") for name in pictures.names]
    if loose := [home for home, slash, _ in homes if not slash]:
        raise InputError(
            f"{pictures.origin}/{loose[0]} lies in no class; give each class a folder, or remove fetch.data.labels"
        )
    classes = sorted({home for home, _, _ in homes})
    if empty := sorted(set(folders) - set(classes)):
        raise InputError(f"{pictures.origin}/{empty[0]} holds no images, though each folder is a class; remove it")
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[home] for home, _, _ in homes], np.int64)
    return Pictures(pictures.origin, pictures.names, pictures.open, labels, classes)


def open_npz(source: NpzData, place: Path) -> Pictures:
    """Open the arrays of an .npz file, which are unpacked into `place` and memory-mapped.

    Raises:
        InputError: The file or a key is missing or damaged, or an array holds something else.
    """
    path = locate(source.path, "fetch.data.path")
    keys = [key for key in (source.images, source.heldout_images) if key]
    parts = [_unpack(path, key, place) for key in keys]
    for key, part in zip(keys, parts, strict=True):
        is_images = part.dtype == np.uint8 and part.ndim in (3, 4) and part.shape[3:] in ((), (1,), (3,))
        if not (is_images and part.size):
            wanted = "wanted are uint8 [N, H, W], or [N, H, W, C] of 1 or 3 channels"
            raise InputError(f"{path} holds {part.dtype} {list(part.shape)} as {key}; {wanted}")

    def open_one(index: int) -> Image.Image:
        part, row = (parts[0], index) if index < len(parts[0]) else (parts[1], index - len(parts[0]))
        return Image.fromarray(part[row].squeeze(-1) if part.shape[3:] == (1,) else part[row])

    names = [f"{key}[{row}]" for key, part in zip(keys, parts, strict=True) for row in range(len(part))]
    num_heldout = sum(len(part) for part in parts[1:])
    return Pictures(str(path), names, open_one, _npz_labels(source, path, parts, place), num_heldout=num_heldout)


def _npz_labels(source: NpzData, path: Path, parts: Sequence[NDArray[Any]], place: Path) -> NDArray[np.int64] | None:
    keys = [key for key in (source.labels, source.heldout_labels) if key]
    found = [_unpack(path, key, place) for key in keys]
    for key, labels, part in zip(keys, found, parts, strict=bool(keys)):
        if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (len(part),):
            wanted = f"wanted is one integer for each of the {len(part)} images"
            raise InputError(f"{path} holds {labels.dtype} {list(labels.shape)} as {key}; {wanted}")
    return np.concatenate(found).astype(np.int64) if found else None


def _unpack(path: Path, key: str, place: Path) -> NDArray[Any]:
    """Memory-map one array; no pickle is ever read."""
    try:
        with zipfile.ZipFile(path) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist()]
            if key not in keys:
                raise InputError(f"{path} holds no array {key!r}; its keys: {', '.join(keys)}")
            member = archive.extract(f"{key}.npy", place)
        return np.lib.format.open_memmap(member, mode="r")
    except UNREADABLE as error:
        raise InputError(f"{path} is no readable .npz file ({first_line(error)}); correct fetch.data.path") from None


def open_hub(source: HubData) -> Pictures:
    """Open the images of a dataset on the Hub.

    Raises:
        InputError: It cannot be had, or a column holds something else.
    """
    try:
        rows = load_dataset(source.repo, revision=source.revision, split=source.split)
    except (DatasetsError, OSError, ValueError) as error:
        reason = first_line(error)
        kind = UnavailableError if isinstance(error, ConnectionError) else InputError
        raise kind(f"dataset {source.repo} at {source.revision}, split {source.split}: {reason}") from None
    if not isinstance(rows.features.get(source.column), ImageFeature):
        raise _no_column(source, rows, "image", source.column)
    if not len(rows):
        raise InputError(f"no images found in {source.repo}, split {source.split}; choose another")
    images = rows.select_columns([source.column])

    def open_one(index: int) -> Image.Image:
        image: Image.Image | None = images[index][source.column]
        if image is None:
            raise ValueError("the row holds none")
        return image

    names = [f"{source.split}[{index}]" for index in range(len(rows))]
    labels, classes = _hub_labels(source, rows) if source.labels else (None, None)
    return Pictures(source.repo, names, open_one, labels, classes)


def _hub_labels(source: HubData, rows: Dataset) -> tuple[NDArray[np.int64], list[str] | None]:
    feature = rows.features.get(source.labels)
    if not str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        raise _no_column(source, rows, "integer", source.labels)
    labels = [-1 if label is None else label for label in rows[source.labels]]
    return np.array(labels, np.int64), getattr(feature, "names", None)


def _no_column(source: HubData, rows: Dataset, kind: str, column: str | None) -> InputError:
    return InputError(f"{source.repo} has no {kind} column {column!r}; its columns: {', '.join(rows.features)}")
