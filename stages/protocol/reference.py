"""The reference of a protocol: the dense model's images, and features of them and of the real images."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray
from pydantic import ValidationError

from stages.data.images import Table, read_table
from stages.models.families import Denoiser
from stages.models.sampling import DEFAULT_CONTEXT, SamplingContext, draw_batches, image_seeds
from stages.protocol.protocol import Protocol
from stages.runtime.errors import InputError, first_line
from stages.storage.files import read_json, write_json
from stages.storage.rows import RowFile, array_file, tensors_file
from stages.storage.tensors import read_array, read_tensors, tensors_sha256, write_array

SAMPLES, FEATURES = "samples.npy", "features.safetensors"


@dataclass(frozen=True)
class Reference:
    """Images and features that are computed once per protocol and reused by every comparison with the dense model."""

    protocol: Protocol
    model_sha256: str
    """Of the dense model, by `dense_sha256`."""
    samples: NDArray[np.uint8]
    """[sets, N, C, H, W] images of the dense model."""
    features: torch.Tensor
    """[sets, N, D] float32 features of the samples."""
    real_features: torch.Tensor
    """[M, D] float32 features of the real images."""
    table: Table | None = None
    """The conditions of each class, the empty one last; None for an unconditional model."""


def dense_sha256(unet: Denoiser, context: SamplingContext) -> str:
    """Hash the weights that decide what a dense model draws: the denoiser's, and its autoencoder's and conditions'.

    Without autoencoder and conditions it is `tensors_sha256` of the denoiser.
    """
    hashes = [tensors_sha256(unet.state_dict())]
    if (autoencoder := context.autoencoder) is not None:
        latents = {name: getattr(autoencoder, name) for name in ("mean", "std")}
        scale = torch.tensor(autoencoder.scale, dtype=torch.float64)
        hashes.append(tensors_sha256({**autoencoder.network.state_dict(), **latents, "scale": scale}))
    if context.table is not None:
        hashes.append(tensors_sha256({"conditions": torch.from_numpy(np.array(context.table))}))
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def check_dense(unet: Denoiser, context: SamplingContext, reference: Reference) -> None:
    """Check that a reference was drawn by this dense model.

    Raises:
        InputError: It was drawn by another one.
    """
    found = dense_sha256(unet, context)
    if found != reference.model_sha256:
        hashes = f"{found[:8]}…, the reference was drawn by {reference.model_sha256[:8]}…"
        raise InputError(f"the dense model has weights of sha256 {hashes}; run the reference stage again")


def draw_set(
    unet: Denoiser,
    scheduler: DDPMScheduler,
    protocol: Protocol,
    index: int,
    batch_size: int,
    label: str,
    context: SamplingContext = DEFAULT_CONTEXT,
    starts: Sequence[int] | None = None,
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Draw the images of one set of the protocol, or those of the batches that begin at `starts`.

    Yields:
        The place of a batch in the set, and its images, [B, C, H, W] uint8.
    """
    return draw_batches(
        unet,
        scheduler,
        image_seeds(protocol.seed, protocol.num_images, index),
        protocol.sampler,
        range(0, protocol.num_images, batch_size) if starts is None else starts,
        precision=protocol.precision,
        batch_size=batch_size,
        label=f"{label}, set {index + 1} of {protocol.sets}",
        context=context,
        labels=context.labels(protocol.seed, protocol.num_images, index),
    )


@dataclass(frozen=True)
class ReferenceFiles:
    """The images and features of a reference in the files that they are written to as they come."""

    samples: RowFile
    """[sets, N, C, H, W] uint8."""
    features: RowFile
    """[sets, N, D] float32."""
    real_features: RowFile
    """[M, D] float32."""

    def row_files(self) -> list[RowFile]:
        """Return the three."""
        return [self.samples, self.features, self.real_features]


def reference_files(folder: Path, protocol: Protocol, image_shape: Sequence[int], num_features: int) -> ReferenceFiles:
    """Describe samples.npy and features.safetensors of a reference."""
    sets = (protocol.sets, protocol.num_images)
    shapes = {"dense": (*sets, num_features), "real": (protocol.num_real_images, num_features)}
    tensors = tensors_file(folder / FEATURES, shapes)
    return ReferenceFiles(
        array_file(folder / SAMPLES, np.uint8, (*sets, *image_shape)), tensors["dense"], tensors["real"]
    )


def write_about(folder: Path, protocol: Protocol, model_sha256: str, table: Table | None = None) -> None:
    """Write protocol.json, reference.json and, if conditional, conditions.npy beside the images and features."""
    write_json(folder / "protocol.json", protocol.model_dump(mode="json"))
    write_json(folder / "reference.json", {"model_sha256": model_sha256})
    if table is not None:
        write_array(folder / "conditions.npy", table)


def read_reference(folder: Path) -> Reference:
    """Read the reference; the samples are memory-mapped.

    Raises:
        InputError: A file is missing or damaged, or does not fit the others.
    """
    protocol = read_protocol(folder / "protocol.json")
    model_sha256 = read_json(folder / "reference.json").get("model_sha256")
    tensors = read_tensors(folder / FEATURES)
    try:
        samples = read_array(folder / SAMPLES)
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
