"""The reference of a protocol: the dense model's images, and features of them and of the real images."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray
from pydantic import ValidationError

from stages.data.images import read_table
from stages.models.families import Denoiser
from stages.models.sampling import DEFAULT_CONTEXT, SamplingContext, draw, image_seeds
from stages.protocol.protocol import Protocol
from stages.runtime.errors import InputError, first_line
from stages.storage.files import read_json, write_json
from stages.storage.tensors import read_array, read_tensors, write_array, write_tensors


@dataclass(frozen=True)
class Reference:
    """Images and features that are computed once per protocol and reused by every comparison with the dense model."""

    protocol: Protocol
    model_sha256: str
    """`tensors_sha256` of the dense model's weights."""
    samples: NDArray[np.uint8]
    """[sets, N, C, H, W] images of the dense model."""
    features: torch.Tensor
    """[sets, N, D] float32 features of the samples."""
    real_features: torch.Tensor
    """[M, D] float32 features of the real images."""
    table: NDArray[np.float32] | None = None
    """[K, S, D] conditions of each class and the empty condition last; None for an unconditional model."""


def draw_set(
    unet: Denoiser,
    scheduler: DDPMScheduler,
    protocol: Protocol,
    index: int,
    batch_size: int,
    label: str,
    context: SamplingContext = DEFAULT_CONTEXT,
) -> NDArray[np.uint8]:
    """Draw the images of one set of the protocol: [N, C, H, W] uint8."""
    return draw(
        unet,
        scheduler,
        image_seeds(protocol.seed, protocol.num_images, index),
        protocol.sampler,
        precision=protocol.precision,
        batch_size=batch_size,
        label=f"{label}, set {index + 1} of {protocol.sets}",
        context=context,
        labels=context.labels(protocol.seed, protocol.num_images, index),
    )


def write_reference(folder: Path, reference: Reference) -> None:
    """Write protocol.json, reference.json, samples.npy, features.safetensors and, if conditional, conditions.npy."""
    write_json(folder / "protocol.json", reference.protocol.model_dump(mode="json"))
    write_json(folder / "reference.json", {"model_sha256": reference.model_sha256})
    write_array(folder / "samples.npy", reference.samples)
    if reference.table is not None:
        write_array(folder / "conditions.npy", reference.table)
    write_tensors(folder / "features.safetensors", {"dense": reference.features, "real": reference.real_features})


def read_reference(folder: Path) -> Reference:
    """Read the reference; the samples are memory-mapped.

    Raises:
        InputError: A file is missing or damaged, or does not fit the others.
    """
    protocol = read_protocol(folder / "protocol.json")
    model_sha256 = read_json(folder / "reference.json").get("model_sha256")
    tensors = read_tensors(folder / "features.safetensors")
    try:
        samples = read_array(folder / "samples.npy")
    except ValueError as error:
        raise InputError(f"{folder} holds no samples ({first_line(error)}); run the reference stage again") from None
    packed = samples.dtype == np.uint8 and samples.ndim == 5  # noqa: PLR2004
    if not (packed and isinstance(model_sha256, str) and _matches(tensors, samples, protocol)):
        raise InputError(f"{folder} does not match its protocol.json; run the reference stage again")
    return Reference(protocol, model_sha256, samples, tensors["dense"], tensors["real"], read_table(folder))


def _matches(tensors: Mapping[str, torch.Tensor], samples: NDArray[np.uint8], protocol: Protocol) -> bool:
    """Whether samples and features have the shapes of the protocol and the features are finite."""
    if set(tensors) != {"dense", "real"} or tensors["real"].ndim != 2:  # noqa: PLR2004
        return False
    width = tensors["real"].shape[1]
    dense, real = (protocol.sets, protocol.num_images, width), (protocol.num_real_images, width)
    shapes = samples.shape[:2] == dense[:2] and tensors["dense"].shape == dense and tensors["real"].shape == real
    return shapes and all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def read_protocol(path: Path) -> Protocol:
    """Read protocol.json.

    Raises:
        InputError: The file is missing or invalid.
    """
    try:
        return Protocol.model_validate(read_json(path))
    except ValidationError as error:
        raise InputError(
            f"{path} is not a valid protocol ({first_line(error)}); run the reference stage again"
        ) from None
