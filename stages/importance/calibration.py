"""Params and packed images -> the calibration batch, and the importance measured on it."""

import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray

from stages.artifacts import Importance, to_model_range
from stages.errors import InputError
from stages.importance.measure import measure_importance
from stages.params import ImportanceParams
from stages.seeds import generator


def calibrate(
    unet: UNet2DModel, scheduler: DDPMScheduler, pixels: NDArray[np.uint8], params: ImportanceParams, seed: int
) -> Importance:
    """Draw the calibration images and their noise, both seeded, and measure on them.

    Raises:
        InputError: There are fewer images than asked for.
    """
    if params.num_images > len(pixels):
        found = f"importance.num_images {params.num_images} is more than the {len(pixels)} training images"
        raise InputError(f"{found}; lower it in params.yaml")
    chosen = torch.randperm(len(pixels), generator=generator(seed, "calibration images"))[: params.num_images]
    images = to_model_range(pixels[np.sort(chosen.numpy())])
    noise = torch.randn(images.shape, generator=generator(seed, "calibration noise"))
    return measure_importance(
        unet,
        scheduler,
        images.to(unet.device),
        noise.to(unet.device),
        range(0, scheduler.config["num_train_timesteps"], params.stride),
        criterion=params.criterion,
        formula=params.formula,
        threshold=params.threshold,
    )
