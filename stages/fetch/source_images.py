"""An image source -> its images, opened one at a time and brought to the size of the model."""

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

from stages.fetch.params import FitParams, HubData, NpzData, expand_path
from stages.runtime.errors import InputError, UnavailableError, first_line

FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
"""Formats that Pillow may decode; some others, such as EPS, run external programs."""
NPZ_ERRORS = (
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
"""What reading a damaged .npz file can raise."""
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
MODES = {1: "L", 3: "RGB"}
"""Number of channels -> Pillow's image mode."""
CELEBA_SIZE, CELEBA_FACE = (178, 218), (25, 57, 25 + 128, 57 + 128)
"""Width and height of an aligned CelebA image; left, top, right and bottom of DDIM's crop."""

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class SourceImages:
    """The images of a source, in a fixed order."""

    origin: str
    """Folder, file, address or repository of the images, for messages."""
    names: Sequence[str]
    """Name of each image, relative to the origin."""
    open: Callable[[int], Image.Image]
    """Index -> the decoded image; may raise any exception if the image is damaged."""
    labels: NDArray[np.int64] | None = None
    """[N]: class of each image; None for a source without classes."""
    classes: Sequence[str] | None = None
    """Names of the classes, in order of their numbers; None if they have no names."""
    num_heldout: int = 0
    """Number of images at the end that the source holds out itself; with 0, fetch.heldout applies."""

    def __len__(self) -> int:
        return len(self.names)


class CorruptImageError(Exception):
    """An image cannot be read without loss; the message has its name and the reason."""


def read_image(images: SourceImages, index: int, shape: tuple[int, int], params: FitParams) -> Pixels:
    """Read one image as uint8 [C, S, S], for a `shape` of (C, S).

    Raises:
        CorruptImageError: It cannot be decoded, or has more than 8 bits per channel.
        InputError: `params.fit` does not accept its size.
    """
    channels, size = shape
    name = f"{images.origin}/{images.names[index]}"
    try:
        image = images.open(index)
    except Exception as error:  # noqa: BLE001  # a damaged file can make a decoder raise any exception
        raise CorruptImageError(f"{name} is not a readable image ({first_line(error)})") from None
    if image.mode.startswith(("I", "F")):
        raise CorruptImageError(f"{name} has more than 8 bits per channel (mode {image.mode})")
    fitted = np.asarray(_fit(image.convert(MODES[channels]), size, params, name))
    return fitted.reshape(size, size, channels).transpose(2, 0, 1)


def _fit(image: Image.Image, size: int, params: FitParams, name: str) -> Image.Image:
    found, resample = f"{name} is {image.width}×{image.height}", Image.Resampling[params.resample.upper()]
    if params.fit == "crop":
        return ImageOps.fit(image, (size, size), resample)
    if params.fit == "celeba":
        if image.size != CELEBA_SIZE:
            raise InputError(f"{found}, aligned CelebA is 178×218; use img_align_celeba or change fetch.data.fit")
        return image.crop(CELEBA_FACE).resize((size, size), resample)
    if image.size != (size, size):
        raise InputError(f"{found}, the model expects {size}×{size}; resize it or set fetch.data.fit: crop")
    return image


def open_folder(folder: Path, origin: str, *, labels: bool) -> SourceImages:
    """Open the images of a folder and its subfolders, sorted by path.

    Args:
        folder: The folder.
        origin: Its name in messages.
        labels: Whether the folders directly below are classes.

    Raises:
        InputError: The folder does not exist or has no images, or an image belongs to no class.
    """
    if not folder.is_dir():
        raise InputError(f"image folder {origin} does not exist; correct fetch.data.path in params.yaml")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise InputError(f"no images found in {origin}; fetch.data accepts {', '.join(sorted(SUFFIXES))}")
    names = [path.relative_to(folder).as_posix() for path in paths]
    images = SourceImages(origin, names, lambda index: _load(paths[index]))
    return _with_classes(images, [it.name for it in folder.iterdir() if it.is_dir()]) if labels else images


def _load(path: Path) -> Image.Image:
    with Image.open(path, formats=FORMATS) as image:
        image.load()
    return image


def _with_classes(images: SourceImages, folders: Iterable[str]) -> SourceImages:
    """Add the class of each image: the first folder in its name."""
    parts = [name.partition("/") for name in images.names]
    if loose := [name for name, slash, _ in parts if not slash]:
        raise InputError(
            f"{images.origin}/{loose[0]} is in no class folder; move it into one, or remove fetch.data.labels"
        )
    classes = sorted({folder for folder, _, _ in parts})
    if empty := sorted(set(folders) - set(classes)):
        raise InputError(f"{images.origin}/{empty[0]} has no images, but each folder is a class; remove it")
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[folder] for folder, _, _ in parts], np.int64)
    return SourceImages(images.origin, images.names, images.open, labels, classes)


def open_npz(source: NpzData, place: Path) -> SourceImages:
    """Open the arrays of an .npz file; they are extracted into the folder `place` and memory-mapped.

    Raises:
        InputError: The file is missing or damaged, a key is missing, or an array has another dtype or shape.
    """
    path = expand_path(source.path, "fetch.data.path")
    keys = [key for key in (source.images, source.heldout_images) if key]
    parts = [_extract(path, key, place) for key in keys]
    for key, part in zip(keys, parts, strict=True):
        is_images = part.dtype == np.uint8 and part.ndim in (3, 4) and part.shape[3:] in ((), (1,), (3,))
        if not (is_images and part.size):
            expected = "expected uint8 [N, H, W], or [N, H, W, C] with 1 or 3 channels"
            raise InputError(f"{path} holds {part.dtype} {list(part.shape)} as {key}; {expected}")

    def open_one(index: int) -> Image.Image:
        part, row = (parts[0], index) if index < len(parts[0]) else (parts[1], index - len(parts[0]))
        return Image.fromarray(part[row].squeeze(-1) if part.shape[3:] == (1,) else part[row])

    names = [f"{key}[{row}]" for key, part in zip(keys, parts, strict=True) for row in range(len(part))]
    num_heldout = sum(len(part) for part in parts[1:])
    return SourceImages(str(path), names, open_one, _npz_labels(source, path, parts, place), num_heldout=num_heldout)


def _npz_labels(source: NpzData, path: Path, parts: Sequence[NDArray[Any]], place: Path) -> NDArray[np.int64] | None:
    keys = [key for key in (source.labels, source.heldout_labels) if key]
    found = [_extract(path, key, place) for key in keys]
    for key, labels, part in zip(keys, found, parts, strict=bool(keys)):
        if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (len(part),):
            expected = f"expected one integer for each of the {len(part)} images"
            raise InputError(f"{path} holds {labels.dtype} {list(labels.shape)} as {key}; {expected}")
    return np.concatenate(found).astype(np.int64) if found else None


def _extract(path: Path, key: str, place: Path) -> NDArray[Any]:
    """Extract one array into `place` and memory-map it; pickled objects are never loaded."""
    try:
        with zipfile.ZipFile(path) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist()]
            if key not in keys:
                raise InputError(f"{path} has no array {key!r}; its keys: {', '.join(keys)}")
            member = archive.extract(f"{key}.npy", place)
        return np.lib.format.open_memmap(member, mode="r")
    except NPZ_ERRORS as error:
        raise InputError(f"{path} is not a readable .npz file ({first_line(error)}); correct fetch.data.path") from None


def open_hub(source: HubData) -> SourceImages:
    """Open the images of a dataset on the Hub.

    Raises:
        InputError: The dataset cannot be loaded, has no images, or a column is missing or has another type.
    """
    try:
        rows = load_dataset(source.repo, revision=source.revision, split=source.split)
    except (DatasetsError, OSError, ValueError) as error:
        reason = first_line(error)
        kind = UnavailableError if isinstance(error, ConnectionError) else InputError
        raise kind(f"dataset {source.repo} at {source.revision}, split {source.split}: {reason}") from None
    if not isinstance(rows.features.get(source.column), ImageFeature):
        raise _missing_column(source, rows, "image", source.column)
    if not len(rows):
        raise InputError(f"no images found in {source.repo}, split {source.split}; choose another split")
    images = rows.select_columns([source.column])

    def open_one(index: int) -> Image.Image:
        image: Image.Image | None = images[index][source.column]
        if image is None:
            raise ValueError("the row has no image")
        return image

    names = [f"{source.split}[{index}]" for index in range(len(rows))]
    labels, classes = _hub_labels(source, rows) if source.labels else (None, None)
    return SourceImages(source.repo, names, open_one, labels, classes)


def _hub_labels(source: HubData, rows: Dataset) -> tuple[NDArray[np.int64], list[str] | None]:
    feature = rows.features.get(source.labels)
    if not str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        raise _missing_column(source, rows, "integer", source.labels)
    labels = [-1 if label is None else label for label in rows[source.labels]]  # -1 is refused with the label check
    return np.array(labels, np.int64), getattr(feature, "names", None)


def _missing_column(source: HubData, rows: Dataset, kind: str, column: str | None) -> InputError:
    return InputError(f"{source.repo} has no {kind} column {column!r}; its columns: {', '.join(rows.features)}")
