"""What a denoiser predicts of a noisy image x_t = α·x₀ + σ·ε: ε, v or x₀; and how x₀ and ε follow from its output.

α = √ᾱ_t and σ = √(1 − ᾱ_t) (Ho et al., 2020, eq. 4), so that α² + σ² = 1 and SNR = α² / σ².
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

Formula = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class PredictionType:
    """One choice of what a model predicts."""

    target: Formula
    """(x₀, ε, α, σ) -> the output of a perfect model."""
    clean: Formula
    """(output, x_t, α, σ) -> x₀."""
    noise: Formula
    """(output, x_t, α, σ) -> ε."""
    error_ratio: Callable[[torch.Tensor], torch.Tensor]
    """SNR -> ‖error of the output‖² / ‖error of x₀‖²."""


PREDICTION_TYPES = {
    "epsilon": PredictionType(  # Ho et al., 2020, eq. 4 solved for x₀
        target=lambda _, noise, _alpha, _sigma: noise,
        clean=lambda output, noisy, alpha, sigma: (noisy - sigma * output) / alpha,
        noise=lambda output, _, _alpha, _sigma: output,
        error_ratio=lambda snr: snr,
    ),
    "v_prediction": PredictionType(  # v = α·ε − σ·x₀ (Salimans and Ho, 2022, section 4 and appendix D)
        target=lambda clean, noise, alpha, sigma: alpha * noise - sigma * clean,
        clean=lambda output, noisy, alpha, sigma: alpha * noisy - sigma * output,
        noise=lambda output, noisy, alpha, sigma: sigma * noisy + alpha * output,
        error_ratio=lambda snr: snr + 1,
    ),
    "sample": PredictionType(  # Ho et al., 2020, eq. 4 solved for ε
        target=lambda clean, _, _alpha, _sigma: clean,
        clean=lambda output, _, _alpha, _sigma: output,
        noise=lambda output, noisy, alpha, sigma: (noisy - alpha * output) / sigma,
        error_ratio=torch.ones_like,
    ),
}
"""prediction_type of a scheduler's config -> its formulas."""


def prediction_type(scheduler: DDPMScheduler) -> PredictionType:
    """Return the formulas of the model that a noise schedule belongs to."""
    return PREDICTION_TYPES[scheduler.config["prediction_type"]]


def training_target(
    scheduler: DDPMScheduler, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Compute what a perfect model outputs for x₀ and ε [B, C, H, W] at timesteps [B]: [B, C, H, W]."""
    signal = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)
    return prediction_type(scheduler).target(clean, noise, signal.sqrt(), (1 - signal).sqrt())


def min_snr_weights(scheduler: DDPMScheduler, gamma: float) -> torch.Tensor:
    """Weigh the loss of the model's own target at each timestep: w [T].

    All types then have the loss min(SNR, γ)·‖x₀ − x̂₀‖²: w is min(SNR, γ) over SNR for ε, over SNR + 1 for v, and over 1
    for x₀ (Hang et al., 2023, section 3.4).
    """
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    return snr.clamp(max=gamma) / prediction_type(scheduler).error_ratio(snr)
