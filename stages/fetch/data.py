"""A data source -> packed uint8 images of the model's size, in a training and a held-out split."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from datasets import Image as ImageFeature
from datasets import load_dataset
from datasets.exceptions import DatasetsError
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.datasets import load_digits

from stages.diffusion.families import Denoiser
from stages.errors import InputError, UnavailableError, first_line
from stages.packed import Images, write_images
from stages.seeds import generator
from stages.sources import BundledSource, FolderData, HubData, S3Data
from stages.storage import Store

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
MODES = {1: "L", 3: "RGB"}
SPLIT_SEED = 0
"""The split never moves, whatever params.yaml says of the seed: held-out losses of all runs compare."""

Source = BundledSource | FolderData | S3Data | HubData
Pixels = NDArray[np.uint8]


def fetch_data(source: Source, unet: Denoiser, heldout: float, out: Path) -> None:
    """Pack the images of `source` for `unet` into the folder `out`.

    Raises:
        InputError: There are no images, or they do not fit the model, or they are not the ones asked for.
    """
    channels, size = unet.config["in_channels"], unet.config["sample_size"]
    pixels = _read(source, channels, size, out.parent)
    sha256 = hashlib.sha256(pixels.tobytes()).hexdigest()
    if isinstance(source, FolderData | S3Data) and source.sha256 not in (None, sha256):
        home = source.path if isinstance(source, FolderData) else source.uri
        wrong = f"the images of {home} have sha256 {sha256}, expected {source.sha256}"
        raise InputError(f"{wrong}; bring back the images or correct fetch.data.sha256")
    write_images(out, split(pixels, heldout), {"source": source.model_dump(mode="json"), "sha256": sha256})


def split(pixels: Pixels, heldout: float) -> Images:
    """Set a share of the images aside, always the same ones for the same images.

    Raises:
        InputError: A split would be empty.
    """
    num_heldout = round(heldout * len(pixels))
    if not 0 < num_heldout < len(pixels):
        raise InputError(
            f"fetch.heldout {heldout} of {len(pixels)} images leaves a split empty; change it or add images"
        )
    order = torch.randperm(len(pixels), generator=generator(SPLIT_SEED, "heldout")).numpy()
    return Images(train=pixels[np.sort(order[num_heldout:])], heldout=pixels[np.sort(order[:num_heldout])])


def _read(source: Source, channels: int, size: int, place: Path) -> Pixels:
    match source:
        case BundledSource():
            if (channels, size) != (1, 16):
                raise InputError(f"the digits are 1×16×16, the model draws {channels}×{size}×{size}; choose fetch.data")
            return bundled_digits()
        case FolderData():
            return _pack(_open_folder(source.path), channels, size, source.fit)
        case S3Data():
            patterns = [f"*{suffix}" for suffix in sorted(SUFFIXES)]
            with Store(source.uri).downloaded(patterns, place) as folder:
                return _pack(_open_folder(folder), channels, size, source.fit)
        case HubData():
            return _pack(_open_hub(source), channels, size, source.fit)


def bundled_digits() -> Pixels:
    """Scikit-learn's UCI digits, 8×8 with 17 grey levels, enlarged bilinearly: [1797, 1, 16, 16] uint8."""
    small = torch.from_numpy(load_digits().images).float()[:, None] * (255 / 16)
    large = torch.nn.functional.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
    pixels: Pixels = large.round().to(torch.uint8).numpy()
    return pixels


def _open_folder(folder: Path) -> Iterator[tuple[str, Image.Image]]:
    if not folder.is_dir():
        raise InputError(f"image folder {folder} does not exist; correct fetch.data.path in params.yaml")
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        with _readable(str(path)), Image.open(path) as image:
            image.load()
        yield str(path), image


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise InputError(f"{name} is not a readable image ({first_line(error)}); remove or replace it") from None


def _open_hub(source: HubData) -> Iterator[tuple[str, Image.Image]]:
    try:
        rows = load_dataset(source.repo, revision=source.revision, split=source.split)
    except (DatasetsError, OSError, ValueError) as error:
        reason = first_line(error)
        kind = UnavailableError if isinstance(error, ConnectionError) else InputError
        raise kind(f"dataset {source.repo} at {source.revision}, split {source.split}: {reason}") from None
    if not isinstance(rows.features.get(source.column), ImageFeature):
        raise InputError(
            f"{source.repo} has no image column {source.column!r}; its columns: {', '.join(rows.features)}"
        )
    for index in range(len(rows)):
        name = f"{source.repo}[{index}]"
        with _readable(name):
            image = rows[index][source.column]
        yield name, image


def _pack(images: Iterable[tuple[str, Image.Image]], channels: int, size: int, fit: str) -> Pixels:
    if channels not in MODES:
        raise InputError(f"the model draws {channels} channels; images have 1 or 3")
    packed = [_fit(name, _convert(name, image, channels), size, fit) for name, image in images]
    if not packed:
        raise InputError(f"no images found; fetch.data wants a folder with {', '.join(sorted(SUFFIXES))} files")
    pixels: Pixels = np.stack(packed).reshape(len(packed), size, size, channels).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pixels)


def _convert(name: str, image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        raise InputError(f"{name} has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits")
    return image.convert(MODES[channels])


def _fit(name: str, image: Image.Image, size: int, fit: str) -> Pixels:
    if fit == "crop":
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    if image.size != (size, size):
        found = f"{image.width}×{image.height}"
        raise InputError(f"{name} is {found}, the model draws {size}×{size}; resize it or set fetch.data.fit: crop")
    return np.asarray(image)
