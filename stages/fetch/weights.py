"""The weights of a component in any layout that diffusers writes -> one safetensors file in float32."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import click
import torch

from stages.fetch.pickles import BIN, check_state_dict, read_pickle
from stages.models.layout import AUTOENCODERS, CLASS_EMBEDDING, WEIGHTS
from stages.models.own_code import is_own
from stages.models.pipeline import autoencoder_folder, denoiser_folder, rename_attention
from stages.runtime.errors import InputError
from stages.storage.files import read_json, temporary_folder
from stages.storage.tensors import read_tensors, write_tensors

STEM = WEIGHTS.removesuffix(".safetensors")
HALF_PRECISION = ("fp16", "bf16")
"""Variants of diffusers with 16-bit weights."""
FULL_PRECISION = (WEIGHTS, f"{WEIGHTS}.index.json", BIN, f"{BIN}.index.json")
LAYOUTS = (
    *FULL_PRECISION,
    *(
        f"{STEM}.{name}"
        for variant in HALF_PRECISION
        for suffix in ("safetensors", "bin")
        for name in (
            f"{variant}.{suffix}",
            f"{suffix}.index.{variant}.json",
            f"{suffix}.{variant}.index.json",  # as diffusers named it until 0.30
        )
    ),
)
"""Names of weights files and of indices of sharded weights, in order of preference."""
OPTIONAL_COMPONENTS = (*AUTOENCODERS, CLASS_EMBEDDING)
"""Components with weights that a pipeline may have in addition to the UNet."""
LINKED_SUFFIXES = {".json", ".md", ".py", ".safetensors"}


def components(folder: Path) -> list[Path]:
    """List the component folders of a pipeline that have weights."""
    return [denoiser_folder(folder), *(folder / name for name in OPTIONAL_COMPONENTS if (folder / name).is_dir())]


def find_weights(component_folder: Path) -> list[Path]:
    """List the weights files and indices of a component, the preferred one first."""
    return [component_folder / name for name in LAYOUTS if (component_folder / name).is_file()]


def unet_weights(folder: Path) -> Path:
    """Find the file that the UNet's weights are read from: safetensors, an index of shards, or a .bin.

    Raises:
        InputError: There is no such file.
    """
    unet = denoiser_folder(folder)
    if files := find_weights(unet):
        return files[0]
    others = ", ".join(sorted(path.name for path in unet.glob(f"{STEM}*")))
    found = f"does not exist, and neither does {BIN}, an index of shards or a variant of 16 bits beside it"
    raise InputError(f"{unet / WEIGHTS} {found}{others and f' (found: {others})'}; complete the folder")


def other_weights(folder: Path) -> list[Path]:
    """List what the weights of the autoencoder and of the class embedding are read from, as `unet_weights` does."""
    parts = (autoencoder_folder(folder), folder / CLASS_EMBEDDING)
    return [files[0] for part in parts if part is not None and (files := find_weights(part))]


def weights_files(path: Path) -> list[Path]:
    """List the files that hold the weights: the shards that an index names, ordered by name, or the file itself.

    Raises:
        InputError: The index is not valid.
    """
    if path.suffix != ".json":
        return [path]
    return [path.with_name(name) for name in sorted(set(_read_index(path).values()))]


def _read_index(path: Path) -> dict[str, str]:
    """Read which shard holds each tensor: name of the tensor -> name of a file beside the index.

    Raises:
        InputError: The file is missing, is not JSON, or does not give each tensor a file beside it.
    """
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(map(_is_weights_name, places.values())):
        raise InputError(f"{path} has no weight_map that gives each tensor a file beside it; fetch it again")
    return places


def _is_weights_name(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.-]+\.(safetensors|bin)", value) is not None


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a weights file, or of the shards that an index names.

    Raises:
        InputError: A file is missing or damaged, holds more than tensors, or not those that the index places there.
    """
    if path.suffix == ".bin":
        return check_state_dict(read_pickle(path), path)
    if path.suffix != ".json":
        return read_tensors(path)
    places = _read_index(path)
    tensors: dict[str, torch.Tensor] = {}
    for shard in weights_files(path):
        if not shard.is_file():
            raise InputError(f"{shard} does not exist, though {path.name} names it; complete the folder")
        held = read_weights(shard)
        listed = {name for name, file in places.items() if file == shard.name}
        if differing := sorted(listed ^ held.keys()):
            found = "does not hold" if differing[0] in listed else "also holds"
            raise InputError(f"{shard} {found} {differing[0]}, unlike {path.name} says; fetch both again")
        tensors |= held
    return tensors


@contextmanager
def with_safetensors(folder: Path, place: Path) -> Iterator[Path]:
    """Yield a pipeline folder whose components each have one safetensors file under its usual name.

    That is `folder`, or a temporary copy in `place`, where weights of another layout are converted.

    Raises:
        InputError: Weights that are converted are incomplete or damaged, or hold more than tensors.
    """
    chosen = {path: files[0] for path in components(folder) if (files := find_weights(path))}
    for path in chosen:
        _announce(find_weights(path), folder)
    files = [file for file in chain(folder.glob("*"), folder.glob("*/*")) if file.suffix in LINKED_SUFFIXES]
    linked = [file for file in files if file.parent not in chosen or not _is_other_layout(file)]
    if len(linked) == len(files) and all(file.name == WEIGHTS for file in chosen.values()):
        yield folder
        return
    with temporary_folder(folder, place) as copy:
        for file in linked:
            link = copy / file.relative_to(folder)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(file.resolve())
        for path, file in chosen.items():
            if file.name != WEIGHTS:
                has_own_class = path == denoiser_folder(folder) and is_own(read_json(path / "config.json"), path)
                tensors = _converted(file, has_own_class=has_own_class)
                write_tensors(copy / path.relative_to(folder) / WEIGHTS, tensors, metadata={"format": "pt"})
        yield copy


def _is_other_layout(file: Path) -> bool:
    return file.name.startswith(STEM) and file.name != WEIGHTS


def _converted(file: Path, *, has_own_class: bool) -> dict[str, torch.Tensor]:
    """Read the weights in float32, under the current names of diffusers, or those of an own class."""
    return {
        name if has_own_class else rename_attention(name): tensor.to(
            torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True
        )
        for name, tensor in read_weights(file).items()
    }


def _announce(files: list[Path], folder: Path) -> None:
    """Print which file is read, if there are several or it has 16-bit weights."""
    first, *others = (file.relative_to(folder).as_posix() for file in files)
    if others:
        click.echo(f"fetch.model: {first} is read, not {', '.join(others)}", err=True)
    if any(f".{variant}." in first for variant in HALF_PRECISION):
        click.echo(f"fetch.model: {first} has 16-bit weights, which become float32", err=True)
