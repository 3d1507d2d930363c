"""Packed images -> noisy batches on which a model before and after a cut are compared."""

from collections.abc import Iterator

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.data.images import Images, check_num_images, to_model_range
from stages.models.families import Denoiser
from stages.prune.params import CalibrationParams
from stages.runtime.errors import InputError
from stages.runtime.seeds import generator

BATCH_SIZE = 16
"""Images per forward pass."""
NoisyBatch = tuple[torch.Tensor, ...]
"""Noisy images [B, C, H, W], their timesteps [B], all equal, and, for a conditional model, its condition."""


class CalibrationBatches:
    """Training images with noise of evenly spaced timesteps, in small batches on the model's device.

    The timesteps are in the middle of equal parts of the schedule.
    Each pair of image and timestep has its own noise; every iteration yields the same batches.

    Args:
        unet: The model; only its device is read.
        scheduler: The noise schedule.
        images: The packed images.
        params: Numbers of images and timesteps.
        seed: The root seed.
        purpose: Name of the draws of images and noise.
        key: The block of params.yaml that `params` is, for messages.
        held_out: Whether to take images from the other end of the random order, which are other ones if there are twice
            as many, and one timestep more, so that nearly all are others.

    Raises:
        InputError: There are fewer than `params.num_images` training images, or `params.num_timesteps` timesteps.
    """

    def __init__(
        self,
        unet: Denoiser,
        scheduler: DDPMScheduler,
        images: Images,
        params: CalibrationParams,
        seed: int,
        *,
        purpose: str,
        key: str,
        held_out: bool = False,
    ) -> None:
        self.purpose, self.count = purpose, len(images.train)
        check_num_images(f"{key}.num_images", params.num_images, self.count)
        order = torch.randperm(self.count, generator=generator(seed, f"{purpose} images"))
        chosen = np.sort((order.flip(0) if held_out else order)[: params.num_images].numpy())
        self.images = to_model_range(images.train[chosen])
        self.conditions = tuple(images.condition_for(chosen, unet.device).values())
        self.last = scheduler.config["num_train_timesteps"] - 1
        if params.num_timesteps > self.last + 1:
            found = f"{key}.num_timesteps {params.num_timesteps} is more than the model's {self.last + 1} timesteps"
            raise InputError(f"{found}; lower it in params.yaml")
        parts = min(params.num_timesteps + held_out, self.last + 1)
        self.timesteps = ((np.arange(parts) + 0.5) / parts * (self.last + 1)).astype(int).tolist()
        self.scheduler, self.seed, self.device = scheduler, seed, unet.device

    def __len__(self) -> int:
        """Count the batches."""
        return len(self.timesteps) * -(-len(self.images) // BATCH_SIZE)

    def __iter__(self) -> Iterator[NoisyBatch]:
        """Yield the batches, timestep by timestep."""
        for timestep in self.timesteps:
            noise = torch.randn(self.images.shape, generator=generator(self.seed, f"{self.purpose} noise", timestep))
            columns = [tensor.split(BATCH_SIZE) for tensor in (self.images, noise, *self.conditions)]
            for images, part, *condition in zip(*columns, strict=True):
                timesteps = torch.full((len(images),), timestep)
                noisy = self.scheduler.add_noise(images, part, timesteps)  # type: ignore[arg-type]  # a narrow annotation
                yield noisy.to(self.device), timesteps.to(self.device), *condition
