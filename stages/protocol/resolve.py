"""Params, noise schedule, extractor and real images -> the protocol that they determine."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.data.images import PixelArray
from stages.models.params import CLIPPING, THRESHOLDING, SamplerParams
from stages.models.samplers import BLOCK, check_sampler, make_sampler
from stages.protocol.extractors import Extractor
from stages.protocol.params import ReferenceParams
from stages.protocol.protocol import Protocol, check_same
from stages.runtime.errors import InputError
from stages.runtime.processes import Processes

SSIM_WINDOW = 11
"""Side of SSIM's Gaussian window, in pixels."""
MIN_REAL_IMAGES = 4
"""Two for the covariance of each half of the real images."""


def make_protocol(
    params: ReferenceParams,
    seed: int,
    scheduler: DDPMScheduler,
    real: PixelArray,
    extractor: Extractor,
    processes: Processes | None = None,
) -> Protocol:
    """Resolve the settings that params.yaml leaves to the model, the data and the extractor.

    Args:
        params: The block reference of params.yaml.
        seed: Root seed of all random draws.
        scheduler: The noise schedule of the dense model.
        real: The real images, [M, C, H, W] uint8.
        extractor: The feature extractor.
        processes: The main one hashes the real images for all; None is this one alone.

    Raises:
        InputError: The sampler does not fit the schedule, or a metric needs larger images or more real images.
    """
    settings = _settings(params, seed, scheduler, extractor)
    check_real_images(params, real.shape[1:], len(real))
    processes = processes or Processes(torch.device("cpu"))
    real_sha256 = processes.share_sha256(lambda: _pixels_sha256(real))
    return Protocol(**settings, num_real_images=len(real), real_sha256=real_sha256)


def check_real_images(params: ReferenceParams, shape: Sequence[int], num_images: int) -> None:
    """Check that real images of the shape [C, H, W] are large enough, and enough, for the metrics.

    Raises:
        InputError: They are not.
    """
    if min(shape[1:]) < SSIM_WINDOW:
        found = f"{shape[1]}×{shape[2]}"
        raise InputError(f"SSIM needs images of at least {SSIM_WINDOW}×{SSIM_WINDOW}, the models generate {found}")
    if num_images < MIN_REAL_IMAGES:
        raise InputError(f"there are {num_images} real images, at least {MIN_REAL_IMAGES} are needed; fetch more")
    needed = {"kid_subset_size": params.kid_subset_size, "neighbours": params.neighbours + 1}
    for key, count in needed.items():
        if count > num_images:
            found = f"reference.{key} {getattr(params, key)} needs {count} real images, there are {num_images}"
            raise InputError(f"{found}; lower it in params.yaml or fetch more")


def _settings(params: ReferenceParams, seed: int, scheduler: DDPMScheduler, extractor: Extractor) -> dict[str, Any]:
    """Return the fields that params, noise schedule and extractor determine; the real images determine the others."""
    check_sampler(scheduler, params.sampler)
    return {
        **resolve_sampler(scheduler, params.sampler),
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


def resolve_sampler(scheduler: DDPMScheduler, sampler: SamplerParams, block: str = BLOCK) -> dict[str, Any]:
    """Return the fields `sampler`, with clipping as the model has it, and `schedule_sha256` of a protocol."""
    config = make_sampler(scheduler, sampler, block).config
    resolved = {key: value for key, value in config.items() if not key.startswith("_")}
    has_own_rule = sampler.scheduler in THRESHOLDING and config["thresholding"]
    clip = None if has_own_rule else sampler.scheduler in CLIPPING and bool(config["clip_sample"])
    return {
        "sampler": sampler.model_copy(update={"clip": clip}),
        "schedule_sha256": hashlib.sha256(json.dumps(resolved, sort_keys=True, default=str).encode()).hexdigest(),
    }


def check_current(
    protocol: Protocol,
    params: ReferenceParams,
    seed: int,
    scheduler: DDPMScheduler,
    extractor: Extractor,
    origin: Path,
) -> None:
    """Check that a reference was made under the protocol of the current params and model.

    Raises:
        InputError: The protocols differ; every field that differs is named.
    """
    current = protocol.model_copy(update=_settings(params, seed, scheduler, extractor))
    check_same(protocol, current, (str(origin), "params.yaml"))


def _pixels_sha256(pixels: PixelArray) -> str:
    digest = hashlib.sha256(str(pixels.shape).encode())
    for start in range(0, len(pixels), 1024):
        digest.update(np.ascontiguousarray(pixels[start : start + 1024]).tobytes())
    return digest.hexdigest()
