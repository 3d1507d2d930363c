"""An image source -> its images, opened one at a time and brought to the size of the model."""

import lzma
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from stages.fetch.listing import FORMATS, SUFFIXES, Listing
from stages.fetch.params import DataSource, FitParams, FolderData, HubData, NpzData
from stages.fetch.shown import DeepImageError, has_colours, to_shown
from stages.runtime.bounded import check_regular
from stages.runtime.environment import check_hub
from stages.runtime.errors import InputError, UnavailableError, first_line
from stages.runtime.network import is_outage
from stages.runtime.paths import expand_path
from stages.runtime.text import printable
from stages.runtime.wording import format_bytes
from stages.storage.files import check_not_pointer
from stages.storage.tensors import read_array

if TYPE_CHECKING:
    from datasets import Dataset

NPZ_ERRORS = (
    EOFError,
    KeyError,
    OSError,
    OverflowError,
    RuntimeError,
    TokenError,
    ValueError,
    lzma.LZMAError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What reading a damaged .npz file can raise."""
MAX_UNPACKED_BYTES = 64 * 2**30
"""Largest array of an .npz file."""
MODES = {1: "L", 3: "RGB"}
"""Number of channels -> Pillow's image mode."""
CELEBA_SIZE, CELEBA_FACE = (178, 218), (25, 57, 25 + 128, 57 + 128)
"""Width and height of an aligned CelebA image; left, top, right and bottom of DDIM's crop."""

Pixels = NDArray[np.uint8]
Shape = tuple[int, int, int]
"""Number of channels, and height and width in pixels."""


@dataclass(frozen=True)
class SourceImages:
    """The images of a source, in a fixed order."""

    origin: str
    """Folder, file, address or repository of the images, for messages."""
    names: Sequence[str]
    """Name of each image, relative to the origin."""
    open: Callable[[int], Image.Image]
    """Index -> the opened image, which may still have to be loaded; may raise any exception if it is damaged."""
    labels: NDArray[np.int64] | None = None
    """[N]: class of each image; None for a source without classes."""
    classes: Sequence[str] | None = None
    """Names of the classes, in order of their numbers; None if they have no names."""
    num_heldout: int = 0
    """Number of images at the end that the source holds out itself; with 0, fetch.heldout applies."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What the source left out, for dataset.json."""

    def __len__(self) -> int:
        return len(self.names)


class CorruptImageError(Exception):
    """An image cannot be read without loss; the message has its name and the reason."""


def check_path(source: DataSource) -> None:
    """Check that a local source exists, before the model is fetched.

    Raises:
        InputError: A variable in its path is not set, or the path does not exist.
    """
    if isinstance(source, FolderData | NpzData):
        path = expand_path(source.path, "fetch.data.path")
        if not path.exists():
            kind = "image folder" if isinstance(source, FolderData) else "file"
            raise InputError(f"{kind} {path} does not exist; correct fetch.data.path in params.yaml")


def read_image(images: SourceImages, index: int, shape: Shape, params: FitParams) -> tuple[Pixels, list[str]]:
    """Read one image as a viewer shows it, as uint8 [C, H, W] of the given shape, and say what was found in it.

    Returns:
        The pixels, and what was found: keys of stages/fetch/omissions.py's REMARKS.

    Raises:
        CorruptImageError: It cannot be decoded, or has more than 8 bits per channel.
        InputError: `params.fit` does not accept its size.
    """
    channels, height, width = shape
    name = printable(f"{images.origin}/{images.names[index]}")
    try:
        with images.open(index) as opened:
            shown, remarks = to_shown(opened, params.background)
        image = shown.convert(MODES[channels])
        if channels == 1 and has_colours(shown):
            remarks.append("coloured")
        if params.fit == "crop" and (image.width < width or image.height < height):
            remarks.append("enlarged")
    except DeepImageError as error:
        reason = f"has more than 8 bits per channel (mode {error}), and nothing says which of its values is white"
        raise CorruptImageError(f"{name} {reason}: convert it to 8 bits") from None
    except Exception as error:  # noqa: BLE001  # a damaged file can make a decoder raise any exception
        raise CorruptImageError(f"{name} is not a readable image ({first_line(error)})") from None
    fitted = np.asarray(_fit(image, (width, height), params, name))
    return fitted.reshape(height, width, channels).transpose(2, 0, 1), remarks


def _fit(image: Image.Image, size: tuple[int, int], params: FitParams, name: str) -> Image.Image:
    """Bring an image to a size, (width, height)."""
    found, resample = f"{name} is {image.width}×{image.height}", Image.Resampling[params.resample.upper()]
    expected = f"the model expects {size[0]}×{size[1]}"
    if params.fit == "crop":
        return ImageOps.fit(image, size, resample)
    if params.fit == "celeba":
        if image.size != CELEBA_SIZE:
            raise InputError(f"{found}, aligned CelebA is 178×218; use img_align_celeba or change fetch.data.fit")
        if size[0] != size[1]:
            raise InputError(f"fetch.data.fit: celeba makes square images, {expected}; set fit: crop")
        return image.crop(CELEBA_FACE).resize(size, resample)
    if image.size != size:
        raise InputError(f"{found}, {expected}; resize it or set fetch.data.fit: crop")
    return image


def open_folder(folder: Path, origin: str, listing: Listing) -> SourceImages:
    """Open the listed images of a folder.

    Raises:
        InputError: There are none.
    """
    if not listing.images:
        others = listing.left_out.get("not_images", [])
        beside = f" ({len(others)} other files, the first is {others[0]})" if others else ""
        raise InputError(f"no images found in {origin}{beside}; fetch.data accepts {', '.join(sorted(SUFFIXES))}")
    about = {"passed_over": listing.about()} if listing.left_out else {}
    return SourceImages(origin, listing.images, lambda at: _open_file(folder / listing.images[at]), about=about)


def _open_file(file: Path | BytesIO) -> Image.Image:
    if isinstance(file, Path):
        check_regular(file)
    try:
        return Image.open(file, formats=tuple(FORMATS))
    except UnidentifiedImageError:
        if isinstance(file, Path):
            check_not_pointer(file)
        raise


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
        """Open the image at an index."""
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
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist()]
            if key not in keys:
                raise InputError(f"{path} has no array {key!r}; its keys: {', '.join(keys)}")
            _check_unpacked(archive.getinfo(f"{key}.npy"), path, place)
            member = archive.extract(f"{key}.npy", place)
        return read_array(Path(member))
    except NPZ_ERRORS as error:
        check_not_pointer(path)
        raise InputError(f"{path} is not a readable .npz file ({first_line(error)}); correct fetch.data.path") from None


def _check_unpacked(member: zipfile.ZipInfo, path: Path, place: Path) -> None:
    """Check that an array fits on the disk: compressed zeros take a thousandth of their size.

    Raises:
        InputError: It does not, or is larger than the limit.
    """
    limit = min(MAX_UNPACKED_BYTES, shutil.disk_usage(place).free)
    if member.file_size > limit:
        found = f"{path} unpacks to {format_bytes(member.file_size)} as {member.filename}, and the limit is"
        raise InputError(f"{found} {format_bytes(limit)}, as much as is free and at most 64 GiB; use a smaller array")


def open_hub(source: HubData) -> SourceImages:
    """Open the images of a dataset on the Hub.

    Raises:
        InputError: The dataset cannot be loaded, has no images, or a column is missing or has another type.
    """
    check_hub()
    from datasets import Image as ImageFeature  # noqa: PLC0415  # a second to import, and no other source needs it
    from datasets import load_dataset  # noqa: PLC0415

    try:
        rows = load_dataset(source.repo, revision=source.revision, split=source.split)
    except Exception as error:  # noqa: BLE001  # datasets and the Hub's client raise exceptions of any kind
        reason = first_line(error)
        kind = UnavailableError if is_outage(error) else InputError
        advice = "check the network" if kind is UnavailableError else "correct repo, revision or split of fetch.data"
        raise kind(f"dataset {source.repo} at {source.revision}, split {source.split}: {reason}; {advice}") from None
    if not isinstance(rows.features.get(source.column), ImageFeature):
        raise _missing_column(source, rows, "image", source.column)
    if not len(rows):
        raise InputError(f"no images found in {source.repo}, split {source.split}; choose another split")
    images = rows.select_columns([source.column]).cast_column(source.column, ImageFeature(decode=False))

    def open_one(index: int) -> Image.Image:
        """Open the image at an index."""
        cell = images[index][source.column]
        if cell is None:
            raise ValueError("the row has no image")
        if cell["bytes"] is not None:
            return _open_file(BytesIO(cell["bytes"]))
        if Path(cell["path"]).is_file():
            return _open_file(Path(cell["path"]))
        remote: Image.Image = ImageFeature().decode_example(cell)  # a file in an archive, or an address
        return remote

    names = [f"{source.split}[{index}]" for index in range(len(rows))]
    labels, classes = _hub_labels(source, rows) if source.labels else (None, None)
    return SourceImages(source.repo, names, open_one, labels, classes)


def _hub_labels(source: HubData, rows: "Dataset") -> tuple[NDArray[np.int64], list[str] | None]:
    feature = rows.features.get(source.labels)
    if not str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
        raise _missing_column(source, rows, "integer", source.labels)
    labels = [-1 if label is None else label for label in rows[source.labels]]  # -1 is refused with the label check
    return np.array(labels, np.int64), getattr(feature, "names", None)


def _missing_column(source: HubData, rows: "Dataset", kind: str, column: str | None) -> InputError:
    return InputError(f"{source.repo} has no {kind} column {column!r}; its columns: {', '.join(rows.features)}")
