"""Params, model and real images -> the protocol, under whose id alone two numbers may be compared."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.data.images import Pixels
from stages.models.params import SamplerParams
from stages.models.sampling import check_sampler, make_sampler
from stages.protocol.extractors import Extractor
from stages.protocol.params import ReferenceParams
from stages.runtime.errors import InputError
from stages.runtime.schema import Frozen, Sha256, flatten

SSIM_WINDOW = 11
"""Side of its Gaussian window, in pixels."""
ENOUGH_IMAGES = 20
"""Images for each feature, below which a warning is given: some 40,000 for Inception's 2,048."""
CLIPPING = ("DDIM", "DDPM")
FEWEST_REAL = 4
"""For a covariance of each half."""


class Protocol(Frozen):
    """Everything that two numbers must have in common to be compared; batch size and device are not in it."""

    sampler: SamplerParams
    guidance: float | None = None
    """Scale of classifier-free guidance; models without conditions have none."""
    precision: Literal["float32", "bfloat16"]
    weights: Literal["stored"] = "stored"
    """Which weights draw: those of the model folders; finetuning leaves its moving average there and no others."""
    schedule_sha256: Sha256
    """Of the noise schedule and all other settings of the sampler, as diffusers resolves them."""
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
    params: ReferenceParams, seed: int, scheduler: DDPMScheduler, real: Pixels, extractor: Extractor
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
    given = _given(params, seed, scheduler, extractor)
    if min(real.shape[2:]) < SSIM_WINDOW:
        found = f"{real.shape[2]}×{real.shape[3]}"
        raise InputError(f"SSIM needs images of at least {SSIM_WINDOW}×{SSIM_WINDOW}, the models draw {found}")
    if len(real) < FEWEST_REAL:
        raise InputError(f"there are {len(real)} real images to compare with, at least {FEWEST_REAL} are needed")
    needed = {"kid_subset_size": params.kid_subset_size, "neighbours": params.neighbours + 1}
    for key, count in needed.items():
        if count > len(real):
            found = f"reference.{key} {getattr(params, key)} needs {count} real images, there are {len(real)}"
            raise InputError(f"{found}; lower it in params.yaml or fetch more")
    return Protocol(**given, num_real_images=len(real), real_sha256=_pixels_sha256(real))


def _given(params: ReferenceParams, seed: int, scheduler: DDPMScheduler, extractor: Extractor) -> dict[str, Any]:
    """What params.yaml, the model's noise schedule and the extractor decide."""
    check_sampler(scheduler, params.sampler)
    config = make_sampler(scheduler, params.sampler).config
    settings = {key: value for key, value in config.items() if key[0] != "_"}
    clip = params.sampler.scheduler in CLIPPING and bool(config["clip_sample"])
    return {
        "sampler": params.sampler.model_copy(update={"clip": clip}),
        "schedule_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest(),
        "guidance": params.guidance,
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


def check_current(
    protocol: Protocol,
    params: ReferenceParams,
    seed: int,
    scheduler: DDPMScheduler,
    extractor: Extractor,
    origin: Path,
) -> None:
    """Refuse a reference that was made under another protocol than that of params.yaml and the model.

    Raises:
        InputError: They differ, with every field that does.
    """
    asked = protocol.model_copy(update=_given(params, seed, scheduler, extractor))
    check_same(protocol, asked, (str(origin), "params.yaml"))


def _pixels_sha256(pixels: Pixels) -> str:
    digest = hashlib.sha256(str(pixels.shape).encode())
    for start in range(0, len(pixels), 1024):
        digest.update(np.ascontiguousarray(pixels[start : start + 1024]).tobytes())
    return digest.hexdigest()


def check_same(one: Protocol, other: Protocol, names: tuple[str, str]) -> None:
    """Refuse to compare across protocols.

    Raises:
        InputError: They differ; every field that does is named with both values.
    """
    pairs = zip(flatten(one.model_dump(mode="json")), flatten(other.model_dump(mode="json")), strict=True)
    unlike = [f"{name} is {_brief(left)} and {_brief(right)}" for (name, left), (_, right) in pairs if left != right]
    if unlike:
        found = f"{names[0]} and {names[1]} were measured under protocols {one.id} and {other.id}"
        raise InputError(f"{found}: {'; '.join(unlike)}; measure both under one protocol")


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) < 40 else f"{text[:8]}…"  # noqa: PLR2004  # of a hash, enough to tell two apart


def bias_warning(protocol: Protocol, num_features: int) -> str | None:
    """Say where so few images bias FID upwards; two values with the same number of images may still be compared."""
    enough = ENOUGH_IMAGES * num_features
    if protocol.num_images >= enough:
        return None
    found = f"FID on {protocol.num_images} images with {num_features} features is biased upwards"
    return f"{found}, and its interval does not show it; compare at equal numbers only, or draw {enough} or more"
