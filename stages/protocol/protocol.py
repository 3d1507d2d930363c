"""Params, model and real images -> the protocol, under whose id alone two numbers may be compared."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray

from stages.diffusion.sampling import make_sampler
from stages.errors import InputError
from stages.params import ReferenceParams, SamplerParams
from stages.protocol.extractors import Extractor
from stages.schema import Frozen, Sha256

SSIM_WINDOW = 11
"""Side of its Gaussian window, in pixels."""
ENOUGH_IMAGES = 5
"""Images for each feature, above which the bias of FID is small beside its spread."""


class Protocol(Frozen):
    """Everything that two numbers must have in common to be compared; batch size and device are not in it."""

    sampler: SamplerParams
    guidance: None = None
    """Scale of classifier-free guidance; models without conditions have none."""
    precision: Literal["float32", "bfloat16"]
    weights: Literal["ema"] = "ema"
    """Which weights draw: the moving average, the only ones that finetuning keeps."""
    num_images: int
    sets: int
    seed: int
    """The root that every image's own seed is derived from, with the index of its set and its own."""
    extractor: str
    layer: str
    extractor_sha256: Sha256
    num_real_images: int
    real_sha256: Sha256
    """Of the real images' shape and pixels. With the extractor they decide the statistics, whose own hash would not be
    the same on two machines."""
    kid_subsets: int
    kid_subset_size: int
    neighbours: int

    @property
    def id(self) -> str:
        """Name the protocol by its content, in 12 hexadecimal digits."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def make_protocol(
    params: ReferenceParams, seed: int, scheduler: DDPMScheduler, real: NDArray[np.uint8], extractor: Extractor
) -> Protocol:
    """Fix what params.yaml leaves to model, data and extractor.

    Args:
        params: The block reference of params.yaml.
        seed: The root of every draw.
        scheduler: The noise schedule of the dense model.
        real: The real images, [M, C, H, W] uint8.
        extractor: What sees them.

    Raises:
        InputError: The sampler does not fit the model, or a metric needs more real images.
    """
    sampler = make_sampler(scheduler, params.sampler)
    if min(real.shape[2:]) < SSIM_WINDOW:
        found = f"{real.shape[2]}×{real.shape[3]}"
        raise InputError(f"SSIM needs images of at least {SSIM_WINDOW}×{SSIM_WINDOW}, the models draw {found}")
    needed = {"kid_subset_size": params.kid_subset_size, "neighbours": params.neighbours + 1}
    for key, count in needed.items():
        if count > len(real):
            found = f"reference.{key} {getattr(params, key)} needs {count} real images, there are {len(real)}"
            raise InputError(f"{found}; lower it in params.yaml or fetch more")
    clip = bool(sampler.config.get("clip_sample", False))
    return Protocol(
        **_given(params, seed, extractor, clip=clip), num_real_images=len(real), real_sha256=_pixels_sha256(real)
    )


def _given(params: ReferenceParams, seed: int, extractor: Extractor, *, clip: bool | None) -> dict[str, Any]:
    """What params.yaml and the extractor decide."""
    return {
        "sampler": params.sampler.model_copy(update={"clip": clip}),
        "precision": params.precision,
        "num_images": params.num_images,
        "sets": params.sets,
        "seed": seed,
        "extractor": params.extractor.name,
        "layer": extractor.layer,
        "extractor_sha256": extractor.sha256,
        "kid_subsets": params.kid_subsets,
        "kid_subset_size": params.kid_subset_size,
        "neighbours": params.neighbours,
    }


def check_current(protocol: Protocol, params: ReferenceParams, seed: int, extractor: Extractor, origin: Path) -> None:
    """Refuse a reference that was made under another protocol than that of params.yaml.

    Raises:
        InputError: They differ, with every field that does.
    """
    clip = protocol.sampler.clip if params.sampler.clip is None else params.sampler.clip
    asked = protocol.model_copy(update=_given(params, seed, extractor, clip=clip))
    check_same(protocol, asked, (str(origin), "params.yaml"))


def _pixels_sha256(pixels: NDArray[np.uint8]) -> str:
    digest = hashlib.sha256(str(pixels.shape).encode())
    for start in range(0, len(pixels), 1024):
        digest.update(np.ascontiguousarray(pixels[start : start + 1024]).tobytes())
    return digest.hexdigest()


def check_same(one: Protocol, other: Protocol, names: tuple[str, str]) -> None:
    """Refuse to compare across protocols.

    Raises:
        InputError: They differ; every field that does is named with both values.
    """
    pairs = zip(_fields(one.model_dump(mode="json")), _fields(other.model_dump(mode="json")), strict=True)
    unlike = [f"{name} is {_brief(left)} and {_brief(right)}" for (name, left), (_, right) in pairs if left != right]
    if unlike:
        found = f"{names[0]} and {names[1]} were measured under protocols {one.id} and {other.id}"
        raise InputError(f"{found}: {'; '.join(unlike)}; measure both under one protocol")


def _fields(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) < 40 else f"{text[:8]}…"  # noqa: PLR2004  # of a hash, enough to tell two apart


def bias_warning(protocol: Protocol, num_features: int) -> str | None:
    """Say where so few images bias FID upwards; two values with the same number of images may still be compared."""
    enough = ENOUGH_IMAGES * num_features
    if protocol.num_images >= enough:
        return None
    found = f"FID on {protocol.num_images} images with {num_features} features is biased upwards"
    return f"{found}; compare it under this protocol only, or draw {enough} or more"
