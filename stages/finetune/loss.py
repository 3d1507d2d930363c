"""Losses of the recovery: images -> one number an image."""

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.diffusion.families import Denoiser


class NoiseLoss:
    """‖ε − ε_θ(x_t, t)‖², averaged over pixels (Ho et al., 2020, eq. 14)."""

    def __init__(self, scheduler: DDPMScheduler) -> None:
        self.scheduler = scheduler

    def draw(self, images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw noise [B, C, H, W] and timesteps [B] for a batch, both on the CPU."""
        noise = torch.randn(images.shape, generator=generator)
        return noise, torch.randint(self.scheduler.config["num_train_timesteps"], (len(images),), generator=generator)

    def __call__(
        self, unet: Denoiser, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """[B, C, H, W] images in [-1, 1] -> loss [B]."""
        noisy = self.scheduler.add_noise(images, noise, timesteps)  # type: ignore[arg-type]  # any integers will do
        predicted: torch.Tensor = unet(noisy, timesteps).sample
        return (predicted - noise).square().mean(dim=(1, 2, 3))
