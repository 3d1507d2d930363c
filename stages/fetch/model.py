"""A model source -> a diffusers folder that is known to load."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from stages.artifacts import WEIGHTS, copy_file, file_sha256, read_json
from stages.diffusion.families import Denoiser, example_inputs
from stages.diffusion.models import component, read_scheduler, read_unet, write_pipeline
from stages.errors import InputError, UnavailableError, first_line
from stages.sources import BundledSource, FolderModel, HubModel, S3Model
from stages.storage import Store

BUNDLED = Path(__file__).parent / "bundled"
BUNDLED_SHA256 = {"digits": "4714527c68bc45b6e608201d3e46c1a527fdd0f95dbb0cc8b5a00671f1de8854"}
CARD = "README.md"
Source = BundledSource | FolderModel | S3Model | HubModel
PARTS = [
    CARD,
    "model_index.json",
    "config.json",
    "scheduler_config.json",
    f"*{WEIGHTS}",
    "unet/*.json",
    "scheduler/*.json",
]


def fetch_model(source: Source, out: Path) -> Denoiser:
    """Bring the model of `source` to the folder `out` in the layout of diffusers, and load it.

    Raises:
        InputError: The model is missing, cannot be reached, is damaged or is not the one asked for.
    """
    with _located(source, out.parent) as (folder, sha256):
        if sha256 is not None:
            check_sha256(component(folder, "unet") / WEIGHTS, sha256)
        check_pixels(folder)
        unet = read_unet(folder)
        try_out(unet, folder)
        write_pipeline(out, unet, read_scheduler(folder))
        if (folder / CARD).is_file():  # its licence binds every model made from this one
            copy_file(folder / CARD, out / CARD)
    return unet


@torch.no_grad()
def try_out(unet: Denoiser, folder: Path) -> None:
    """Run the model once, so that one that cannot draw is refused here and not by a later stage.

    Raises:
        InputError: It fails, or its output is not finite or of another shape.
    """
    inputs = example_inputs(unet)
    try:
        output = unet(**inputs).sample
    except Exception as error:  # noqa: BLE001  # a config from anywhere can break diffusers anywhere
        raise InputError(f"{folder}: the model does not run ({first_line(error)})") from None
    if output.shape != inputs["sample"].shape or not output.isfinite().all():
        raise InputError(f"{folder}: the model's output is not finite or not of its input's shape")


def check_pixels(folder: Path) -> None:
    """Refuse latent diffusion: a UNet whose pictures only a decoder makes visible.

    Raises:
        InputError: The pipeline has an autoencoder.
    """
    index = folder / "model_index.json"
    decoders = {"vae", "vqvae"} & set(read_json(index) if index.is_file() else {})
    if decoders:
        raise InputError(f"{index} names a {decoders.pop()}: latent diffusion; supported: models that draw pixels")


@contextmanager
def _located(source: Source, place: Path) -> Iterator[tuple[Path, str | None]]:
    """Give the folder of a model and the hash that it should have; what must be downloaded first lies in `place`."""
    match source:
        case BundledSource():
            yield BUNDLED / source.name, BUNDLED_SHA256[source.name]
        case FolderModel():
            yield source.path, source.sha256
        case S3Model():
            with Store(source.uri).downloaded(PARTS, place) as folder:
                yield folder, source.sha256
        case HubModel():
            yield _download(source), None  # the commit pins every file


def _download(source: HubModel) -> Path:
    try:
        return Path(snapshot_download(source.repo, revision=source.revision, allow_patterns=PARTS))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        is_down = isinstance(error, LocalEntryNotFoundError) and not HF_HUB_OFFLINE
        kind = UnavailableError if is_down else InputError
        raise kind(
            f"{source.repo} at {source.revision} is neither in the Hub's cache nor to be had from the Hub "
            f"({first_line(error)}); "
            "connect, set HF_HOME to a cache that holds it, or set fetch.model to a local folder"
        ) from None


def check_sha256(path: Path, expected: str) -> None:
    """Compare a file with the hash that it should have.

    Raises:
        InputError: The file is missing or is another one.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    found = file_sha256(path)
    if found != expected:
        raise InputError(
            f"{path} has sha256 {found}, expected {expected}; fetch it again or correct fetch.model.sha256"
        )
