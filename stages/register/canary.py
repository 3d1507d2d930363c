"""A downloaded version -> whether its own code draws the images that its weights draw.

A version contains code that nobody has reviewed. It runs in a sandbox; the images that it should draw are made here,
after the sandbox has ended, from its safetensors and configs by Espalier's classes. Only a version with its own class
is drawn in a second sandbox: that class could print the same false pictures in both.
"""

import base64
import binascii
import io
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from stages.fetch.class_embedding import read_class_embedding
from stages.models.autoencoder import decoded_shape, read_autoencoder
from stages.models.own_code import is_own, read_sample_shape
from stages.models.pipeline import CPU, denoiser_folder, read_scheduler
from stages.models.samplers import make_sampler
from stages.models.sampling import SamplingContext, to_pixels, trajectory
from stages.models.variants.folder import read_model
from stages.protocol.evaluation import read_evaluation
from stages.register.package import replace_quadratic
from stages.register.registry import EVIDENCE, MODEL
from stages.register.sandbox.run import Limits, run_in_sandbox
from stages.runtime.errors import InputError, MachineError, first_line
from stages.runtime.wording import count
from stages.storage.files import read_json

NUM_IMAGES = 4
MAX_SEED = 2**31
TIMEOUT_S = 1800
BASE_MEMORY_BYTES = 8 << 30
"""Address space of Python with PyTorch, diffusers and MLflow."""
MEMORY_PER_BYTE = 8
"""Memory for the weights and activations of a model, per byte of its files."""
PROGRAM, EXPECTED = Path(__file__).with_name("sandboxed_draw.py"), Path(__file__).with_name("sandboxed_expected.py")
PACKAGE = Path(__file__).parents[1]
"""The code of Espalier's stages."""


def check_canary(
    folder: Path,
    levels: float,
    seeds: Sequence[int] = (),
    variant: str | None = None,
    expect: Callable[[Path, Sequence[int]], Iterable[NDArray[Any]]] | None = None,
) -> str:
    """Draw images with the code of a version, and compare them with those that its weights draw.

    Args:
        folder: The downloaded version.
        levels: Largest mean absolute difference of an image, in grey levels from 0 to 255.
        seeds: Seeds of an earlier check, to repeat it; empty draws new ones, which nobody could know beforehand.
        variant: Kind of the graph with which the code draws; None for the model. A graph is opened in the sandbox only.
        expect: Draws the images that are expected, after the sandbox has ended; None draws those of the weights.

    Returns:
        The reason of the check, with the seeds.

    Raises:
        InputError: The version cannot be loaded, does not draw, or draws a blank or another image.
    """
    seeds = seeds or new_seeds()
    drawn = draw_isolated(folder, seeds, variant)
    if set(drawn) != set(seeds):
        raise InputError(f"it drew images for the seeds {_join(sorted(drawn)) or 'none'}, expected {_join(seeds)}")
    expected = list((expect or _expected)(folder, seeds))  # of a shape that no sandbox chose
    images = [_decode_png(drawn[seed], image.shape) for seed, image in zip(seeds, expected, strict=True)]
    return compare(seeds, images, expected, levels)


def new_seeds() -> list[int]:
    """Draw seeds that nobody could know beforehand."""
    return [secrets.randbelow(MAX_SEED) for _ in range(NUM_IMAGES)]


def compare(
    seeds: Sequence[int], images: Iterable[NDArray[Any]], expected: Iterable[NDArray[Any]], levels: float
) -> str:
    """Compare images, [H, W] or [H, W, C] from 0 to 255, with those that are expected; returns the reason of the check.

    Raises:
        InputError: An image is of another shape or blank, or further off than `levels`.
    """
    worst = 0.0
    for seed, image, wanted in zip(seeds, images, expected, strict=True):
        if image.shape != wanted.shape:  # NumPy would repeat the smaller one
            found, allowed = (" x ".join(map(str, it.shape)) for it in (image, wanted))
            raise InputError(f"seed {seed} gives an image of {found}; allowed: {allowed}, as the weights draw")
        if image.std() == 0:
            raise InputError(f"seed {seed} gives a blank image")
        worst = max(worst, float(np.abs(image.astype(float) - wanted).mean()))
    found = (
        f"{count(len(seeds), 'image')} from the seeds {_join(seeds)}, off by {worst:.3g} levels; allowed: {levels:g}"
    )
    if worst > levels:
        raise InputError(found)
    return found


def _join(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _expected(folder: Path, seeds: Sequence[int]) -> Iterable[NDArray[Any]]:
    """Draw with the classes of Espalier, outside of sandboxes; a version with its own class is drawn in a sandbox.

    The class could print any pictures there, so their shape is that of the configs.
    """
    place = denoiser_folder(folder / MODEL)
    config = read_json(place / "config.json")
    if not is_own(config, place):
        return draw_expected(folder, seeds)
    samples, autoencoder = read_sample_shape(config, place / "config.json"), read_autoencoder(folder / MODEL, CPU)
    channels, *sides = decoded_shape(samples, autoencoder)
    with tempfile.TemporaryDirectory(prefix="espalier-code-") as temporary:
        code = Path(temporary) / "stages"
        shutil.copytree(PACKAGE, code, ignore=shutil.ignore_patterns("bundled", "__pycache__"))
        drawn = _run(folder, EXPECTED, ["version", "stages"], seeds, {"stages": code})
    if set(drawn) != set(seeds):
        raise InputError(f"its weights draw images for the seeds {_join(sorted(drawn)) or 'none'}")
    return (_decode_png(drawn[seed], (*sides, channels) if channels > 1 else tuple(sides)) for seed in seeds)


def draw_isolated(folder: Path, seeds: Sequence[int], variant: str | None = None) -> dict[int, bytes]:
    """Draw one image per seed with the code of a version, in a sandbox: seed -> PNG.

    Raises:
        InputError: The version cannot be loaded, does not draw, or exceeds a limit.
    """
    return _run(folder, PROGRAM, ["version", variant or ""], seeds, {})


def _run(
    folder: Path, program: Path, arguments: Sequence[str], seeds: Sequence[int], more: Mapping[str, Path]
) -> dict[int, bytes]:
    """Run a program that draws with a version, in a sandbox; `more` are the files that it reads besides."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    limits = Limits(memory_bytes=BASE_MEMORY_BYTES + MEMORY_PER_BYTE * size, timeout_s=TIMEOUT_S)
    try:
        output = run_in_sandbox(program, [*arguments, *map(str, seeds)], {"version": folder, **more}, limits)
    except MachineError:
        raise
    except InputError as error:
        raise InputError(f"the version does not draw ({error.message})") from None
    lines = [re.fullmatch(rb"(\d{1,10}) ([A-Za-z0-9+/]+=*)", line) for line in output.splitlines()]
    try:
        return {int(line[1]): base64.b64decode(line[2], validate=True) for line in lines if line}
    except binascii.Error as error:
        raise InputError(f"the version does not draw (its output is invalid: {error})") from None


@torch.inference_mode()
def draw_expected(folder: Path, seeds: Sequence[int], model: Path | None = None) -> list[NDArray[np.uint8]]:
    """Draw with the weights of a version, without its code: one array [H, W] or [H, W, C] per seed.

    Args:
        folder: The version.
        seeds: One per image.
        model: Folder of a variant that draws in place of the version's model, by the same protocol.

    Raises:
        InputError: A file of the model or of its evaluation is missing or damaged.
    """
    model, protocol = model or folder / MODEL, read_evaluation(folder / EVIDENCE / "evaluation").protocol
    unet, scheduler = read_model(model), read_scheduler(model)
    params = replace_quadratic(protocol.sampler, scheduler)
    table = read_class_embedding(unet, model)
    context = SamplingContext(read_autoencoder(model, CPU), table, protocol.guidance)
    labels = [] if table is None else [seed % (len(table) - 1) for seed in seeds]
    sampler = make_sampler(scheduler, params)
    try:
        *_, samples = trajectory(unet, sampler, seeds, params.eta, context, labels)
        pixels = to_pixels(context.decode(samples))
    except RuntimeError as error:
        raise InputError(f"the weights of the version do not draw ({first_line(error)})") from None
    return [image[0] if len(image) == 1 else image.transpose(1, 2, 0) for image in pixels]


def _decode_png(png: bytes, shape: tuple[int, ...]) -> NDArray[np.float64]:  # [H, W] or [H, W, C], 0 to 255
    """Decode an image, after checking its size: a small file may claim a huge one."""
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            found: Any = (image.height, image.width)
            pixels = np.asarray(image, dtype=np.float64) if found == shape[:2] else None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"an image of the canary is invalid ({first_line(error)})") from None
    if pixels is None or pixels.shape != shape:
        raise InputError(f"the version draws an image of another size or kind than {' x '.join(map(str, shape))}")
    return pixels
