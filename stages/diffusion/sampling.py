"""A UNet and one seed an image -> images."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray

from stages.diffusion.families import Denoiser
from stages.errors import InputError
from stages.progress import track
from stages.seeds import derive_seed


def image_seeds(seed: int, num_images: int) -> list[int]:
    """Give every image a seed of its own, so that batching cannot change a picture."""
    return [derive_seed(seed, "sample", index) for index in range(num_images)]


def draw(
    unet: Denoiser, scheduler: DDPMScheduler, seeds: Sequence[int], *, steps: int, batch_size: int, label: str
) -> NDArray[np.uint8]:
    """Draw one image from each seed by DDIM with eta 0 (Song et al., 2021, eq. 12), uniform spacing.

    Returns:
        [N, C, H, W] uint8.

    Raises:
        InputError: The steps cannot be spaced uniformly.
    """
    check_steps(scheduler, steps)
    unet.eval()
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(steps)
    starts = range(0, len(seeds), batch_size)
    batches = [
        _draw_batch(unet, ddim, initial_noise(unet, seeds[start : start + batch_size]))
        for start in track(starts, f"draw {label}, batch", len(starts))
    ]
    return np.concatenate(batches)


def check_steps(scheduler: DDPMScheduler, steps: int) -> None:
    """Refuse numbers of steps that would begin below the highest noise level.

    Raises:
        InputError: The steps do not divide the timesteps of the training.
    """
    num_timesteps = scheduler.config["num_train_timesteps"]
    if num_timesteps % steps:
        found = f"evaluate.sampler_steps {steps} does not divide the {num_timesteps} timesteps of the model"
        raise InputError(f"{found}, so drawing would not begin at full noise; choose a divisor")


def initial_noise(unet: Denoiser, seeds: Sequence[int]) -> torch.Tensor:
    """Draw the noise that each seed stands for: [N, C, H, W] float32."""
    shape = (unet.config["in_channels"], unet.config["sample_size"], unet.config["sample_size"])
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.inference_mode()
def _draw_batch(unet: Denoiser, ddim: DDIMScheduler, images: torch.Tensor) -> NDArray[np.uint8]:
    images = images.to(unet.device)
    for timestep in ddim.timesteps:
        (images, *_) = ddim.step(unet(images, timestep).sample, timestep, images, eta=0.0, return_dict=False)
    pixels: NDArray[np.uint8] = ((images.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    return pixels
