"""A denoiser and a seed -> calibration images that it draws, anew at every timestep."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.data.images import Conditions, to_condition
from stages.importance.measure import CalibrationBatch
from stages.importance.params import ImportanceParams
from stages.models.families import Denoiser
from stages.models.params import SamplerParams
from stages.models.samplers import make_sampler
from stages.models.sampling import SamplingContext, check_guidance, trajectory
from stages.runtime.device import computing
from stages.runtime.errors import InputError
from stages.runtime.seeds import derive_seed, generator

BLOCK = "importance.draw"


@dataclass(frozen=True)
class DrawnImages:
    """Draws images, their classes and their noise from seeds that differ between timesteps, batches and noises."""

    unet: Denoiser
    """The dense model."""
    scheduler: DDPMScheduler
    """The noise schedule of its training."""
    context: SamplingContext
    """The conditions and the guidance scale; samples are not decoded."""
    steps: int
    """Number of DDIM steps."""
    num_images: int
    """Images of each timestep."""
    seed: int
    batch: int = 0
    """Index of the images and classes."""
    noise: int = 0
    """Index of the noise."""

    @torch.no_grad()
    @computing("float32")  # whatever the precision of the measurement
    def at(self, timestep: int) -> CalibrationBatch:
        """Draw images of distinct classes, and noise, for a timestep; equal timesteps get equal draws."""
        seeds, labels = self.seeds(timestep), self.labels(timestep)
        sampler = make_sampler(self.scheduler, SamplerParams(steps=self.steps), BLOCK)
        *_, images = trajectory(self.unet, sampler, seeds, context=self.context, labels=labels)
        draws = generator(self.seed, "calibration noise", self.batch, self.noise, timestep)
        noise = torch.randn(images.shape, generator=draws).to(images.device)
        return CalibrationBatch(images, noise, self._condition(labels, images.device))

    def seeds(self, timestep: int) -> list[int]:
        """Derive the seed of each image of a timestep."""
        names = ("calibration sample", self.batch, timestep)
        return [derive_seed(self.seed, *names, index) for index in range(self.num_images)]

    def labels(self, timestep: int) -> list[int]:
        """Draw a distinct class for each image of a timestep; empty for an unconditional model."""
        if self.context.table is None:
            return []
        draws = generator(self.seed, "calibration classes", self.batch, timestep)
        return torch.randperm(len(self.context.table) - 1, generator=draws)[: self.num_images].tolist()

    def _condition(self, labels: list[int], device: torch.device) -> dict[str, torch.Tensor]:
        if self.context.table is None:
            return {}
        found = to_condition(torch.from_numpy(self.context.table), labels)
        return {name: rows.to(device) for name, rows in found.items()}


def drawn_images(
    unet: Denoiser, scheduler: DDPMScheduler, conditions: Conditions | None, params: ImportanceParams, seed: int
) -> Iterator[DrawnImages]:
    """Return `params.batches` draws of images with `params.noises` noises each.

    Raises:
        InputError: The schedule does not allow the steps, the model does not support guidance, or there are fewer
            classes than images.
    """
    assert params.draw is not None
    steps, guidance, num_images = params.draw.steps, params.draw.guidance, params.num_images
    table = conditions.table if conditions else None
    make_sampler(scheduler, SamplerParams(steps=steps), BLOCK)
    check_guidance(table, guidance, BLOCK, "the model")
    if table is not None and num_images > len(table) - 1:
        found = f"importance.num_images {num_images} is more than the {len(table) - 1} classes"
        raise InputError(f"{found}, and importance.draw gives each image another one; lower it in params.yaml")
    draw = DrawnImages(unet, scheduler, SamplingContext(table=table, guidance=guidance), steps, num_images, seed)
    indices = itertools.product(range(params.batches), range(params.noises))
    return (dataclasses.replace(draw, batch=batch, noise=noise) for batch, noise in indices)
