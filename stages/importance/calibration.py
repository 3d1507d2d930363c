"""Params and packed images -> the calibration batches, and the importance measured on them."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray

from stages.artifacts import Importance
from stages.diffusion.families import Denoiser
from stages.errors import InputError
from stages.importance.criteria import CRITERIA
from stages.importance.measure import Draw, measure_importance
from stages.packed import to_model_range
from stages.params import ImportanceParams
from stages.seeds import generator


def calibrate(
    unet: Denoiser, scheduler: DDPMScheduler, pixels: NDArray[np.uint8], params: ImportanceParams, seed: int
) -> Importance:
    """Draw the calibration images and their noise, both seeded, and measure on them.

    Raises:
        InputError: There are fewer images or timesteps than asked for, or the model is conditional and nothing gives
            conditions.
    """
    if params.num_images > len(pixels):
        found = f"importance.num_images {params.num_images} is more than the {len(pixels)} training images"
        raise InputError(f"{found}; lower it in params.yaml")
    if isinstance(unet, UNet2DConditionModel) and CRITERIA[params.criterion].gradients:
        raise InputError(
            "packed images hold no conditions for a UNet2DConditionModel; set importance.criterion to magnitude or "
            "random, or call stages.oneshot.plan_one_shot with condition="
        )
    timesteps = choose_timesteps(scheduler.config["num_train_timesteps"], params)
    importance = measure_importance(
        unet,
        scheduler,
        draw_calibration(unet, pixels, params, seed),
        timesteps,
        criterion=params.criterion,
        formula=params.formula,
        threshold=params.threshold,
        timesteps_per_pass=params.timesteps_per_pass,
        precision=params.precision,
    )
    finite = all(math.isfinite(loss) for losses in importance.losses for loss in losses)
    if not finite or not all(values.isfinite().all() for values in importance.saliency.values()):
        raise InputError("losses or gradients are not finite; use another checkpoint, or importance.precision float32")
    return importance


def choose_timesteps(total: int, params: ImportanceParams) -> range:
    """Take the timesteps that may count, ascending.

    Args:
        total: T, of which the noise schedule has timesteps 0 to T - 1.
        params: The block importance of params.yaml.

    Raises:
        InputError: More are asked for than there are.
    """
    timesteps = range(0, total, params.stride)
    if params.num_timesteps is not None and params.num_timesteps > len(timesteps):
        found = f"importance.num_timesteps {params.num_timesteps} is more than the {len(timesteps)} timesteps"
        raise InputError(f"{found} that stride {params.stride} takes of {total}; lower one of them in params.yaml")
    return timesteps[: params.num_timesteps]


def draw_calibration(unet: Denoiser, pixels: NDArray[np.uint8], params: ImportanceParams, seed: int) -> Iterator[Draw]:
    """Draw batches of images without replacement within each, and noises for each of them, one at a time."""
    for batch in range(params.batches):
        chosen = torch.randperm(len(pixels), generator=generator(seed, "calibration images", batch))
        images = to_model_range(pixels[np.sort(chosen[: params.num_images].numpy())])
        for index in range(params.noises):
            noise = torch.randn(images.shape, generator=generator(seed, "calibration noise", batch, index))
            yield Draw(images.to(unet.device), noise.to(unet.device))
