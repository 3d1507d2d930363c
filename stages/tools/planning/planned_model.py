"""A model source -> a model to plan with: the fetched one, or one of its config with fresh weights."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from stages.data.images import Table
from stages.fetch import model as fetch_model
from stages.fetch.class_embedding import read_class_embedding
from stages.fetch.convert import DDIM_NOISE, LDM_NOISE, NUM_CLASSES, SYSTEMS, VQ_F4, check_layout
from stages.fetch.convert_dit import DIT_NOISE
from stages.fetch.params import BundledModel, CheckpointModel, FolderModel, HubModel, ModelSource
from stages.fetch.weights import components
from stages.models.autoencoder import Autoencoder, read_autoencoder
from stages.models.checks import check_supported
from stages.models.families import CLASSES, OWN, Denoiser, family_of, find_family
from stages.models.groups import weighted_layers
from stages.models.layout import WEIGHTS
from stages.models.own_code import is_own
from stages.models.pipeline import denoiser_folder, read_scheduler, read_unet
from stages.models.schedules import make_schedule
from stages.models.trial import check_prunable
from stages.runtime.errors import InputError, UnavailableError, first_line
from stages.runtime.paths import expand_path
from stages.storage.files import read_json

HUB_SYSTEMS = {
    "google/ddpm-cifar10-32": "cifar10",
    "google/ddpm-ema-cifar10-32": "cifar10",
    "google/ddpm-church-256": "lsun-256",
    "google/ddpm-ema-church-256": "lsun-256",
    "google/ddpm-bedroom-256": "lsun-256",
    "google/ddpm-ema-bedroom-256": "lsun-256",
}
"""Repositories on the Hub whose config is that of one of the paper's systems, so that no network is needed."""
SD_AUTOENCODER: Mapping[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
"""Config of Stable Diffusion's AutoencoderKL."""
DDIM_SCHEDULE = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, **DDIM_NOISE}


@dataclass(frozen=True)
class PlannedModel:
    """A model of the right architecture; where its weights are random, its costs are right all the same."""

    unet: Denoiser
    scheduler: DDPMScheduler
    autoencoder: Autoencoder | None
    table: Table | None
    """Conditions of the classes; None for an unconditional model."""
    origin: str
    """Where it comes from, for messages."""


def open_model(source: ModelSource, fetched: Path | None, device: torch.device) -> PlannedModel:
    """Open the model that a source describes, without converting or downloading its weights where its config will do.

    Args:
        source: fetch.model of params.yaml.
        fetched: The folder that the stage fetch wrote for this source; None if it has not run.
        device: Where the model is put.

    Raises:
        InputError: The model is missing, its config is not supported, or its weights cannot be read.
        UnavailableError: The Hub does not answer.
    """
    if fetched is not None:
        return read_model(fetched, device)
    match source:
        case BundledModel():
            return read_model(fetch_model.bundled_folder(source.name)[0], device)
        case FolderModel():
            return _folder_model(source, expand_path(source.path, "fetch.model.path"), device)
        case HubModel():
            return _hub_model(source, device)
        case CheckpointModel():
            return _checkpoint_model(source, device)
        case _:  # only its server knows the architecture
            return _fetched(source, device)


def _fetched(source: ModelSource, device: torch.device) -> PlannedModel:
    """Fetch a model into a temporary folder, as the stage does, and read it."""
    with tempfile.TemporaryDirectory() as temporary:
        fetch_model.fetch_model(source, Path(temporary) / "model")
        return read_model(Path(temporary) / "model", device)


def read_model(folder: Path, device: torch.device) -> PlannedModel:
    """Read a model folder that the stage fetch wrote, or one of that layout."""
    unet = read_unet(folder, device)
    table = read_class_embedding(unet, folder)
    return PlannedModel(unet, read_scheduler(folder), read_autoencoder(folder, device), table, str(folder))


def _initialise(config: Mapping[str, Any], origin: str, device: torch.device) -> Denoiser:
    """Build a model of a config with random weights."""
    check_supported(config, Path(origin))
    try:
        torch.manual_seed(0)
        unet: Denoiser = CLASSES[config["_class_name"]].from_config(dict(config))
        for layer in weighted_layers(unet).values() if "pruned_widths" in config else ():
            layer.reset_parameters()  # a pruned class leaves weights to whoever reads them
    except Exception as error:  # noqa: BLE001  # a config from anywhere can break diffusers anywhere
        raise InputError(f"{origin} is not a valid config ({first_line(error)})") from None
    check_prunable(unet, origin)
    return unet.to(device).eval()  # type: ignore[arg-type,no-any-return]  # diffusers wraps away the types


def _folder_model(source: FolderModel, folder: Path, device: torch.device) -> PlannedModel:
    """Open a diffusers folder by its config; one that must be converted, or has an own class, is fetched."""
    if not all((part / WEIGHTS).is_file() for part in components(folder)):
        return _fetched(source, device)
    place = denoiser_folder(folder) / "config.json"
    config = read_json(place)
    if is_own(config, place.parent):
        return _fetched(source, device)
    unet = _initialise(config, str(place), device)
    return PlannedModel(
        unet,
        read_scheduler(folder),
        read_autoencoder(folder, device),
        read_class_embedding(unet, folder),
        str(folder),
    )


def _hub_model(source: HubModel, device: torch.device) -> PlannedModel:
    """Open a model on the Hub by its configs: those of a known repository, of the Hub's cache, or downloaded."""
    if source.repo in HUB_SYSTEMS:
        config = read_json(SYSTEMS / f"{HUB_SYSTEMS[source.repo]}.json")
        schedule = make_schedule(DDIM_SCHEDULE, Path(source.repo))
        return PlannedModel(_initialise(config, source.repo, device), schedule, None, None, source.repo)
    config = read_json(_hub_file(source, "unet/config.json", "transformer/config.json", "config.json"))
    path = _hub_file(source, "scheduler/scheduler_config.json", "scheduler_config.json")
    schedule = make_schedule(read_json(path), path)
    if source.trust and find_family(config) in (None, OWN):
        raise InputError(f"{source.repo} has an own class; fetch it first: dvc repro fetch")
    unet = _initialise(config, source.repo, device)
    if family_of(unet).condition_width(unet) or "vae" in _hub_index(source) or "vqvae" in _hub_index(source):
        raise InputError(f"{source.repo} has more parts than a UNet; fetch it first: dvc repro fetch")
    if family_of(unet).num_labels(unet) is not None:
        raise InputError(f"{source.repo} has classes, of which one may be empty; fetch it first: dvc repro fetch")
    return PlannedModel(unet, schedule, None, None, source.repo)


def _hub_index(source: HubModel) -> Mapping[str, Any]:
    return read_json(_hub_file(source, "model_index.json"))


def _hub_file(source: HubModel, *names: str) -> Path:
    """Return the first of some files of a repository, from the Hub's cache or downloaded.

    Raises:
        InputError: The repository has none of them.
        UnavailableError: The Hub does not answer.
    """
    for name in names:
        try:
            return Path(hf_hub_download(source.repo, name, revision=source.revision))
        except LocalEntryNotFoundError as error:
            advice = "check the network, or fetch the model first where there is one"
            raise UnavailableError(f"{source.repo}: {name} cannot be read ({first_line(error)}); {advice}") from None
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise InputError(f"{source.repo}: {first_line(error)}; correct fetch.model.repo or .revision") from None
    raise InputError(
        f"{source.repo} at {source.revision} has no {names[0]}; give the repository of a diffusers pipeline"
    )


def _dit_model(source: CheckpointModel, unet: Denoiser, device: torch.device) -> PlannedModel:
    """Give a DiT an autoencoder of Stable Diffusion's architecture, which all of its authors' models have."""
    coder = AutoencoderKL(**SD_AUTOENCODER)
    schedule = make_schedule({**DDIM_SCHEDULE, **DIT_NOISE}, Path(source.system))
    labels = cast("Any", np.arange(family_of(unet).num_labels(unet) or 0))
    return PlannedModel(unet, schedule, Autoencoder(coder.to(device)), labels, source.system)


def _checkpoint_model(source: CheckpointModel, device: torch.device) -> PlannedModel:
    """Build the system that a checkpoint must hold; the file itself is not opened."""
    config = check_layout(source)
    unet = _initialise(config, source.system, device)
    if source.layout == "dit":
        return _dit_model(source, unet, device)
    if source.layout == "ddim":
        schedule = make_schedule(DDIM_SCHEDULE, Path(source.system))
        return PlannedModel(unet, schedule, None, None, source.system)
    noise = {**DDIM_SCHEDULE, **LDM_NOISE}
    coder = VQModel.from_config({key: value for key, value in VQ_F4.items() if key != "_class_name"})
    table = np.ones((NUM_CLASSES + 1, 1, config["cross_attention_dim"]), np.float32)
    autoencoder = Autoencoder(coder.to(device))
    schedule = make_schedule(noise, Path(source.system))
    return PlannedModel(unet, schedule, autoencoder, table, source.system)
