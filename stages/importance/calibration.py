"""Params and packed images -> the calibration batches, and the importance measured on them."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.data.images import Images, to_model_range
from stages.importance.measure import Draw, measure_importance
from stages.importance.params import ImportanceParams
from stages.models.families import Denoiser
from stages.models.saliency import Importance
from stages.runtime.errors import InputError
from stages.runtime.seeds import generator


def calibrate(
    unet: Denoiser, scheduler: DDPMScheduler, images: Images, params: ImportanceParams, seed: int
) -> Importance:
    """Draw the calibration images and their noise, both seeded, and measure on them.

    Raises:
        InputError: There are fewer images or timesteps than asked for, or something is not finite.
    """
    if params.num_images > len(images.train):
        found = f"importance.num_images {params.num_images} is more than the {len(images.train)} training images"
        raise InputError(f"{found}; lower it in params.yaml")
    timesteps = choose_timesteps(scheduler.config["num_train_timesteps"], params)
    importance = measure_importance(
        unet,
        scheduler,
        draw_calibration(unet, images, params, seed),
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


def draw_calibration(unet: Denoiser, images: Images, params: ImportanceParams, seed: int) -> Iterator[Draw]:
    """Draw batches of images without replacement within each, and noises for each of them, one at a time."""
    for batch in range(params.batches):
        order = torch.randperm(len(images.train), generator=generator(seed, "calibration images", batch))
        chosen = np.sort(order[: params.num_images].numpy())
        clean, condition = (
            to_model_range(images.train[chosen]).to(unet.device),
            images.condition_for(chosen, unet.device),
        )
        for index in range(params.noises):
            noise = torch.randn(clean.shape, generator=generator(seed, "calibration noise", batch, index))
            yield Draw(clean, noise.to(unet.device), condition)
