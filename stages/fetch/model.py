"""A model source -> a diffusers folder, checked by loading and running the model."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import LocalEntryNotFoundError

from stages.data.images import Table
from stages.fetch.class_embedding import read_class_embedding
from stages.fetch.convert import converted
from stages.fetch.model_folder import announce_left_out, check_links
from stages.fetch.params import (
    BundledModel,
    CheckpointModel,
    FolderModel,
    HubModel,
    ModelFolder,
    ModelSource,
    RegistryModel,
    S3Model,
)
from stages.fetch.pickles import BIN
from stages.fetch.release_list import FILES_LIST, check_listed
from stages.fetch.weights import (
    FULL_PRECISION,
    HALF_PRECISION,
    OPTIONAL_COMPONENTS,
    STEM,
    components,
    other_weights,
    unet_weights,
    weights_files,
    with_safetensors,
)
from stages.models.autoencoder import image_shape, read_autoencoder
from stages.models.families import Denoiser, family_of, sample_shape
from stages.models.layout import CODE, DENOISERS, WEIGHTS
from stages.models.own_code import read_own_files
from stages.models.pipeline import denoiser_folder, read_scheduler, read_unet, write_pipeline
from stages.models.sampling import check_variance, to_pixels
from stages.models.trial import check_prunable, check_runs
from stages.models.trust import trusting
from stages.runtime.environment import check_hub
from stages.runtime.errors import InputError, UnavailableError, first_line
from stages.runtime.network import is_outage
from stages.runtime.paths import expand_path
from stages.storage.files import copy_file, file_sha256, temporary_folder
from stages.storage.s3 import Store
from stages.tracking import mlflow_client

BUNDLED = Path(__file__).parent / "bundled"
BUNDLED_SHA256 = {
    "digits": "4714527c68bc45b6e608201d3e46c1a527fdd0f95dbb0cc8b5a00671f1de8854",
    "photos": "de806b62ed0f62a176f81ac51edb37b4d68cb5cd8e17999708f8c1d63284fc9c",
}
CARD = "README.md"
FILES = [
    CARD,
    "model_index.json",
    "config.json",
    "scheduler_config.json",
    f"*{WEIGHTS}",
    f"{STEM}*.json",
    *(f"{name}/*.json" for name in (*DENOISERS, "scheduler", *OPTIONAL_COMPONENTS)),
    f"*/{CODE}",
]
"""Patterns of the files that are downloaded."""


class FetchedModel(NamedTuple):
    """A model that was loaded and checked."""

    unet: Denoiser
    class_table: Table | None
    """The conditions of the classes, the empty one last; None for an unconditional model."""


def fetch_model(source: ModelSource, out: Path) -> FetchedModel:
    """Write the model of `source` to the folder `out` in the layout of diffusers, and load it.

    Raises:
        InputError: The model is missing, cannot be downloaded, is damaged or has another hash than expected.
    """
    with (
        _opened(source, out.parent) as (folder, code_sha256),
        trusting(is_trusted=is_trusted(source), code_sha256=code_sha256),
    ):
        unet = read_unet(folder)
        class_table = read_class_embedding(unet, folder)
        scheduler = read_scheduler(folder)
        check_variance(unet, scheduler, str(folder))
        if family_of(unet).proven:  # before it is traced without values, for which its code may not be made
            check_runs(unet, scheduler.config["num_train_timesteps"], str(folder))
        check_prunable(unet, str(folder))
        check_runs(unet, scheduler.config["num_train_timesteps"], str(folder))
        check_autoencoder(unet, folder)
        write_pipeline(out, unet, scheduler, source=folder)
        if (folder / CARD).is_file():  # its licence binds every model made from this one
            copy_file(folder / CARD, out / CARD)
    return FetchedModel(unet, class_table)


def is_trusted(source: ModelSource) -> bool:
    """Whether the code of a model's own class may be run."""
    return isinstance(source, ModelFolder) and source.trust


def check_autoencoder(unet: Denoiser, folder: Path) -> None:
    """Decode and encode once, if the model has an autoencoder.

    Raises:
        InputError: The autoencoder raises an exception, or its latents do not have the UNet's shape or are not finite.
    """
    autoencoder = read_autoencoder(folder, unet.device)
    if autoencoder is None:
        return
    shape = sample_shape(unet)
    try:
        images = autoencoder.decode(torch.zeros(1, *shape, device=unet.device))
        latents = autoencoder.encode(to_pixels(images))
    except Exception as error:  # noqa: BLE001  # as above
        raise InputError(f"{folder}: the autoencoder does not fit the model ({first_line(error)})") from None
    if images.shape[1:] != image_shape(unet, autoencoder):
        found, expected = tuple(images.shape[1:]), image_shape(unet, autoencoder)
        raise InputError(
            f"{folder}: the autoencoder makes images {found}, expected {expected} of its block_out_channels"
        )
    if latents.shape[1:] != shape or not (images.isfinite().all() and np.isfinite(latents).all()):
        raise InputError(f"{folder}: the autoencoder makes latents {latents.shape[1:]}, the model expects {shape}")


@contextmanager
def _opened(source: ModelSource, place: Path) -> Iterator[tuple[Path, str | None]]:
    """Yield the diffusers folder of a model, with its hash checked and safetensors only, and the hash of its own class.

    Downloaded and converted files are stored in the folder `place`.
    """
    with ExitStack() as stack:
        if isinstance(source, CheckpointModel):
            path = expand_path(source.path, "fetch.model.path")
            check_sha256(path, source.sha256)
            yield stack.enter_context(converted(path, source, place)), None
        else:
            folder, sha256 = stack.enter_context(_downloaded(source, place))
            check_links(folder)
            announce_left_out(folder)
            own = read_own_files(denoiser_folder(folder)) if is_trusted(source) else {}
            check_sha256(unet_weights(folder), sha256, own, other_weights(folder))
            code_sha256 = hashlib.sha256(own[CODE]).hexdigest() if CODE in own else None
            yield stack.enter_context(with_safetensors(folder, place)), code_sha256


@contextmanager
def _downloaded(
    source: BundledModel | FolderModel | S3Model | HubModel | RegistryModel, place: Path
) -> Iterator[tuple[Path, str | None]]:
    """Yield the folder of a model and the expected hash of its weights; None skips the check."""
    match source:
        case BundledModel():
            yield bundled_folder(source.name)
        case FolderModel():
            yield expand_path(source.path, "fetch.model.path"), source.sha256
        case S3Model():
            patterns = [*FILES, f"*{STEM}*"]
            with Store(source.uri).downloaded(patterns, place, preferred={f"{STEM}*": WEIGHTS}) as folder:
                yield folder, source.sha256
        case HubModel():
            yield _download(source), None  # the commit pins every file
        case RegistryModel():
            with temporary_folder(source.uri, place) as target:
                yield _download_version(source, target), source.sha256


def bundled_folder(name: str) -> tuple[Path, str]:
    """Return the folder of a bundled model and the hash of its weights.

    Raises:
        InputError: It is not there.
    """
    folder = BUNDLED / name
    if name not in BUNDLED_SHA256 or not folder.is_dir():
        found = f"the bundled model {name} is missing: {folder} and its hash in stages/fetch/model.py"
        raise InputError(f"{found}; make both by recipes/{name}.py, or choose another fetch.model")
    return folder, BUNDLED_SHA256[name]


def _download(source: HubModel) -> Path:
    """Download a model into the Hub's cache; other layouts than one safetensors file only for components without it."""
    check_hub()
    try:
        patterns = [*FILES, FILES_LIST]
        folder = Path(snapshot_download(source.repo, revision=source.revision, allow_patterns=patterns))
        for list_missing in (_missing_weights, _missing_variants):
            if paths := [path.relative_to(folder).as_posix() for path in list_missing(folder)]:
                snapshot_download(source.repo, revision=source.revision, allow_patterns=paths)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  # the client raises exceptions of any kind
        is_down = (isinstance(error, LocalEntryNotFoundError) or is_outage(error)) and not HF_HUB_OFFLINE
        kind = UnavailableError if is_down else InputError
        raise kind(
            f"{source.repo} at {source.revision} is neither in the Hub's cache nor can it be downloaded "
            f"({first_line(error)}); "
            "check the network, set HF_HOME to a cache with the model, or set fetch.model to a local folder"
        ) from None
    check_listed(folder, f"{source.repo} at {source.revision}")
    return folder


def _missing_weights(folder: Path) -> list[Path]:
    """List the shards, or the .bin, of the components that have no single safetensors file."""
    parts = [path for path in components(folder) if not (path / WEIGHTS).is_file()]
    indices = [[path / f"{name}.index.json" for name in (WEIGHTS, BIN)] for path in parts]
    found = [next((index for index in pair if index.is_file()), pair[0].with_name(BIN)) for pair in indices]
    return [file for path in found for file in weights_files(path)]


def _missing_variants(folder: Path) -> list[Path]:
    """List patterns of the 16-bit weights of the components that have no weights yet."""
    missing = [path for path in components(folder) if not any((path / name).is_file() for name in FULL_PRECISION)]
    return [path / f"{STEM}*.{variant}*" for path in missing for variant in HALF_PRECISION]


def _download_version(source: RegistryModel, target: Path) -> Path:
    try:
        return mlflow_client.download_model(source.uri, target)
    except InputError as error:
        raise type(error)(f"{error.message}; correct fetch.model.uri or MLFLOW_TRACKING_URI") from None


def check_sha256(
    path: Path,
    expected: str | None,
    own: Mapping[str, bytes] = MappingProxyType({}),
    others: Sequence[Path] = (),
) -> None:
    """Compare the hash of a file, or of the shards that an index names, with the expected one; None skips the check.

    Args:
        path: The file, or the index of the shards.
        expected: The hash.
        own: The files of an own class by name, which are hashed behind all weights.
        others: Files or indices of further weights of the model, which are hashed behind those of `path`.

    Raises:
        InputError: A file is missing, or the hash is another.
    """
    if expected is None:
        return
    files = [file for weights in (path, *others) for file in weights_files(weights)]
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(f"{missing[0]} does not exist")
    found = file_sha256(*files, more=b"".join(own.values()))
    if found != expected:
        more = [*(f"{other.parent.name}/{other.name}" for other in others), *own]
        name = f"{path} with {', '.join(more)}" if more else str(path)
        missed = _left_out(path, expected, own, others)
        belong = "belongs" if len(missed) == 1 else "belong"
        hint = f" (that is the hash without {' and '.join(missed)}, which {belong} to it)" if missed else ""
        advice = "correct fetch.model.sha256" if missed else "download it again or correct fetch.model.sha256"
        raise InputError(f"{name} has sha256 {found}, expected {expected}{hint}; {advice}")


def _left_out(path: Path, expected: str, own: Mapping[str, bytes], others: Sequence[Path]) -> list[str]:
    """Name the components without which the weights have the expected hash; none if that is so of no part of them."""
    for number in range(len(others)):
        files = [file for weights in (path, *others[:number]) for file in weights_files(weights)]
        if expected == file_sha256(*files, more=b"".join(own.values())):
            return [other.parent.name for other in others[number:]]
    return []
