"""Params and packed images -> seeded calibration batches, and the importance measured on them."""

from collections.abc import Iterator

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.data.images import Images, check_num_images, to_model_range
from stages.importance.drawn import drawn_images
from stages.importance.measure import NOT_FINITE, CalibrationBatch, CalibrationDraw, measure_importance
from stages.importance.params import ImportanceParams
from stages.importance.partial import PartialSum
from stages.models.families import Denoiser
from stages.models.saliency import Importance
from stages.runtime.errors import InputError
from stages.runtime.processes import Processes
from stages.runtime.seeds import generator


def calibrate(
    unet: Denoiser,
    scheduler: DDPMScheduler,
    images: Images,
    params: ImportanceParams,
    seed: int,
    processes: Processes | None = None,
    partial: PartialSum | None = None,
) -> Importance:
    """Measure the importance on calibration images and noise that depend only on the seed; processes share timesteps.

    Raises:
        InputError: There are fewer images or timesteps than params.yaml requires, or a loss or gradient is not finite.
    """
    draws = calibration_draws(unet, scheduler, images, params, seed)
    timesteps = choose_timesteps(scheduler.config["num_train_timesteps"], params.stride, params.num_timesteps)
    importance = measure_importance(
        unet,
        scheduler,
        draws,
        timesteps,
        criterion=params.criterion,
        formula=params.formula,
        threshold=params.threshold,
        timesteps_per_pass=params.timesteps_per_pass,
        precision=params.precision,
        processes=processes,
        partial=partial,
    )
    if not all(values.isfinite().all() for values in importance.saliency.values()):
        raise InputError(NOT_FINITE)
    return importance


def choose_timesteps(total: int, stride: int, num_timesteps: int | None) -> range:
    """Select the first `num_timesteps` of the timesteps 0, stride, 2·stride, … < total; None selects all.

    Raises:
        InputError: The stride passes over all but the first, or there are fewer than `num_timesteps`.
    """
    if stride >= total > 1:
        found = f"importance.stride {stride} leaves only timestep 0 of {total}"
        raise InputError(f"{found}; lower it, or write stride: 1 and num_timesteps: 1 for that one")
    timesteps = range(0, total, stride)
    if num_timesteps is not None and num_timesteps > len(timesteps):
        found = f"importance.num_timesteps {num_timesteps} is more than the {len(timesteps)} timesteps"
        raise InputError(f"{found} that stride {stride} leaves of {total}; lower one of them in params.yaml")
    return timesteps[:num_timesteps]


def calibration_draws(
    unet: Denoiser, scheduler: DDPMScheduler, images: Images, params: ImportanceParams, seed: int
) -> Iterator[CalibrationDraw]:
    """Return `params.batches` times `params.noises` draws: of training images, or of images that the model draws.

    Raises:
        InputError: There are fewer images or classes than params.yaml requires, or the model cannot draw as it says.
    """
    if params.draw is not None:
        return drawn_images(unet, scheduler, images.conditions, params, seed)
    check_num_images("importance.num_images", params.num_images, len(images.train))
    return calibration_batches(unet, images, params, seed)


def calibration_batches(
    unet: Denoiser, images: Images, params: ImportanceParams, seed: int
) -> Iterator[CalibrationBatch]:
    """Draw `params.batches` sets of training images, each without replacement, and `params.noises` noises for each."""
    for batch in range(params.batches):
        order = torch.randperm(len(images.train), generator=generator(seed, "calibration images", batch))
        chosen = np.sort(order[: params.num_images].numpy())
        clean = to_model_range(images.train[chosen]).to(unet.device)
        condition = images.condition_for(chosen, unet.device)
        for index in range(params.noises):
            noise = torch.randn(clean.shape, generator=generator(seed, "calibration noise", batch, index))
            yield CalibrationBatch(clean, noise.to(unet.device), condition)
