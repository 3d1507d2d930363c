"""Models and real images -> one row of metrics a model, under one protocol."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray

from stages.diffusion.cost import count_macs, count_params
from stages.diffusion.families import Denoiser
from stages.diffusion.latency import measure_latencies_ms
from stages.diffusion.sampling import check_steps, draw, image_seeds
from stages.errors import InputError
from stages.evaluate.consistency import check_size, images_to_ssim
from stages.evaluate.quality import features_to_quality, images_to_features
from stages.params import EvaluateParams


@dataclass(frozen=True)
class Comparison:
    """What the models were found to be, and what they drew."""

    metrics: dict[str, dict[str, Any]]
    """protocol, then one block a model."""
    drawn: dict[str, NDArray[np.uint8]]
    """Model -> [N, C, H, W], the n-th image of each from the same noise."""


def compare(
    models: Mapping[str, Denoiser],
    scheduler: DDPMScheduler,
    real: NDArray[np.uint8],
    params: EvaluateParams,
    seed: int,
) -> Comparison:
    """Measure all models under the protocol of `params`; the first one is what the others are compared with.

    Raises:
        InputError: The protocol does not fit the models or the images; nothing has been drawn then.
    """
    check_protocol(scheduler, real, params)
    real_features = images_to_features(real, params)
    seeds = image_seeds(seed, params.num_images)
    drawn = {
        name: draw(unet, scheduler, seeds, steps=params.sampler_steps, batch_size=params.batch_size, label=name)
        for name, unet in models.items()
    }
    latencies_ms = measure_latencies_ms(models, params.latency_repeats)
    reference = next(iter(drawn.values()))
    metrics: dict[str, dict[str, Any]] = {"protocol": _protocol(params, seed, len(real))}
    for name, unet in models.items():
        similarity = images_to_ssim(drawn[name], reference, params.batch_size)
        metrics[name] = {
            "params": count_params(unet),
            "macs": count_macs(unet),
            **asdict(features_to_quality(images_to_features(drawn[name], params), real_features, params, seed)),
            "ssim": float(similarity.mean()),
            "ssim_std": float(similarity.std()),
            "latency_ms": latencies_ms[name],
        }
    return Comparison(metrics, drawn)


def check_protocol(scheduler: DDPMScheduler, real: NDArray[np.uint8], params: EvaluateParams) -> None:
    """Check what can be checked before the first image is drawn.

    Raises:
        InputError: Too small images, too few of them, or steps that do not divide the timesteps.
    """
    check_size(real)
    check_steps(scheduler, params.sampler_steps)
    if params.kid_subset_size > len(real):
        found = f"evaluate.kid_subset_size {params.kid_subset_size} is more than the {len(real)} real images"
        raise InputError(f"{found}; lower it in params.yaml")


def _protocol(params: EvaluateParams, seed: int, num_real: int) -> dict[str, Any]:
    """What must be equal for two numbers to be comparable."""
    return {
        "num_images": params.num_images,
        "num_real_images": num_real,
        "seed": seed,
        "seeds": "one an image, derived from seed, 'sample' and its index",
        "sampler": "DDIM, eta 0, uniform spacing",
        "sampler_steps": params.sampler_steps,
        "extractor": params.extractor,
        "kid_subsets": params.kid_subsets,
        "kid_subset_size": params.kid_subset_size,
        "latency": f"median of {params.latency_repeats} forward passes of one image, the models taking turns",
    }
