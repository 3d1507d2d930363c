"""A model source -> a diffusers folder that is known to load."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from stages.fetch.convert import converted
from stages.fetch.params import (
    BundledSource,
    CheckpointModel,
    FolderModel,
    HubModel,
    ModelSource,
    RegistryModel,
    S3Model,
    locate,
)
from stages.fetch.pickles import BESIDE, BIN, lacking, unpickled, weights_that_count
from stages.models.autoencoder import read_codec
from stages.models.families import Denoiser, example_inputs, sample_shape
from stages.models.layout import CLASS_EMBEDDING, WEIGHTS
from stages.models.pipeline import read_scheduler, read_unet, write_pipeline
from stages.models.sampling import to_pixels
from stages.runtime.errors import InputError, UnavailableError, first_line
from stages.storage.files import copy_file, file_sha256, read_json, temporary_folder
from stages.storage.s3 import Store
from stages.storage.tensors import read_tensors
from stages.tracking import mlflow_client

BUNDLED = Path(__file__).parent / "bundled"
BUNDLED_SHA256 = {"digits": "4714527c68bc45b6e608201d3e46c1a527fdd0f95dbb0cc8b5a00671f1de8854"}
CARD = "README.md"
PARTS = [
    CARD,
    "model_index.json",
    "config.json",
    "scheduler_config.json",
    f"*{WEIGHTS}",
    *(f"{name}/*.json" for name in ("unet", "scheduler", *BESIDE)),
]


def fetch_model(source: ModelSource, out: Path) -> Denoiser:
    """Bring the model of `source` to the folder `out` in the layout of diffusers, and load its UNet.

    Raises:
        InputError: The model is missing, cannot be reached, is damaged or is not the one asked for.
    """
    with _located(source, out.parent) as folder:
        unet = read_unet(folder)
        check_class_embedding(unet, folder)
        try_out(unet, folder)
        try_codec(unet, folder)
        write_pipeline(out, unet, read_scheduler(folder), source=folder)
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


def try_codec(unet: Denoiser, folder: Path) -> None:
    """Decode and encode once, where the model draws latents.

    Raises:
        InputError: The autoencoder fails, or its latents are not those of the model.
    """
    codec = read_codec(folder, unet.device)
    if codec is None:
        return
    shape = sample_shape(unet)
    try:
        pictures = codec.decode(torch.zeros(1, *shape, device=unet.device))
        latents = codec.encode(to_pixels(pictures))
    except Exception as error:  # noqa: BLE001  # likewise
        raise InputError(f"{folder}: the autoencoder does not fit the model ({first_line(error)})") from None
    if latents.shape[1:] != shape or not (pictures.isfinite().all() and np.isfinite(latents).all()):
        raise InputError(f"{folder}: the autoencoder makes latents {latents.shape[1:]}, the model takes {shape}")


def check_class_embedding(unet: Denoiser, folder: Path) -> None:
    """Make sure that a conditional model comes with the embedding of its classes.

    Raises:
        InputError: There is none, or it does not fit the model.
    """
    home = folder / CLASS_EMBEDDING
    if not isinstance(unet, UNet2DConditionModel):
        if home.is_dir():
            raise InputError(f"{home} embeds classes, and the model beside it takes none; remove it")
        return
    width = unet.config["cross_attention_dim"]
    if not home.is_dir():
        raise InputError(f"{home} does not exist; supported: models of pictures or of classes, not of text")
    config, weight = read_json(home / "config.json"), read_tensors(home / WEIGHTS).get("weight", torch.empty(0))
    shape = list(weight.shape)
    if shape[1:] != [width] or config.get("width") != width:
        found = f"a weight of shape {shape} and width {config.get('width')} in its config.json"
        raise InputError(f"{home} has {found}, the model takes {width}; bring both together")
    classes, without = config.get("num_classes"), config.get("unconditional")
    fits = type(classes) is int and 0 < classes <= shape[0]
    if not fits or not (without is None or (type(without) is int and 0 <= without < shape[0])):
        found = f"{classes} classes and row {without} for none"
        raise InputError(f"{home} has {shape[0]} rows, but {found} in its config.json; correct it")
    if not weight.isfinite().all():
        raise InputError(f"{home} holds values that are not finite; use another checkpoint")


@contextmanager
def _located(source: ModelSource, place: Path) -> Iterator[Path]:
    """Give the diffusers folder of a model, checked and without pickles; what must be made first lies in `place`."""
    with ExitStack() as stack:
        if isinstance(source, CheckpointModel):
            path = locate(source.path, "fetch.model.path")
            check_sha256(path, source.sha256)
            yield stack.enter_context(converted(path, source.layout, source.system, place))
        else:
            folder, sha256 = stack.enter_context(_downloaded(source, place))
            check_sha256(weights_that_count(folder), sha256)
            yield stack.enter_context(unpickled(folder, place))


@contextmanager
def _downloaded(
    source: BundledSource | FolderModel | S3Model | HubModel | RegistryModel, place: Path
) -> Iterator[tuple[Path, str | None]]:
    """Give the folder of a model and the hash that its weights should have."""
    match source:
        case BundledSource():
            yield BUNDLED / source.name, BUNDLED_SHA256[source.name]
        case FolderModel():
            yield locate(source.path, "fetch.model.path"), source.sha256
        case S3Model():
            with Store(source.uri).downloaded([*PARTS, f"*{BIN}"], place, preferred={BIN: WEIGHTS}) as folder:
                yield folder, source.sha256
        case HubModel():
            yield _download(source), None  # the commit pins every file
        case RegistryModel():
            with temporary_folder(source.uri, place) as home:
                yield _download_version(source, home), source.sha256


def _download(source: HubModel) -> Path:
    """Download what is needed into the Hub's cache; of pickles only what has no safetensors beside it."""
    try:
        folder = Path(snapshot_download(source.repo, revision=source.revision, allow_patterns=PARTS))
        if pickles := [(home / BIN).relative_to(folder).as_posix() for home in lacking(folder)]:
            snapshot_download(source.repo, revision=source.revision, allow_patterns=pickles)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        is_down = isinstance(error, LocalEntryNotFoundError) and not HF_HUB_OFFLINE
        kind = UnavailableError if is_down else InputError
        raise kind(
            f"{source.repo} at {source.revision} is neither in the Hub's cache nor to be had from the Hub "
            f"({first_line(error)}); "
            "connect, set HF_HOME to a cache that holds it, or set fetch.model to a local folder"
        ) from None
    return folder


def _download_version(source: RegistryModel, home: Path) -> Path:
    try:
        return mlflow_client.download_model(source.uri, home)
    except InputError as error:
        raise type(error)(f"{error.message}; correct fetch.model.uri or MLFLOW_TRACKING_URI") from None


def check_sha256(path: Path, expected: str | None) -> None:
    """Compare a file with the hash that it should have, where it should have one.

    Raises:
        InputError: The file is missing or is another one.
    """
    if expected is None:
        return
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    found = file_sha256(path)
    if found != expected:
        raise InputError(
            f"{path} has sha256 {found}, expected {expected}; fetch it again or correct fetch.model.sha256"
        )
