"""What student and teacher make of a batch -> one number an image, for each loss of the recovery."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.finetune.params import LossParams


@dataclass(frozen=True)
class Prediction:
    """One batch as the models see it."""

    noise: torch.Tensor
    """ε: [B, C, H, W]."""
    student: torch.Tensor
    """What the pruned model predicts of it."""
    teacher: torch.Tensor | None = None
    """What the dense model predicts of it."""
    features: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    """Of each block the student's and, of the same channels, the teacher's: [B, K, H, W]."""


class Loss(Protocol):
    """What the losses have in common."""

    def __call__(self, seen: Prediction) -> torch.Tensor:
        """Give a number for each image: [B]."""
        ...


class NoiseLoss:
    """‖ε − ε_s‖², averaged over pixels (Ho et al., 2020, eq. 14)."""

    def __call__(self, seen: Prediction) -> torch.Tensor:
        """Prediction -> [B]."""
        return _mean_square(seen.student - seen.noise)


class OutputDistillation:
    """‖ε_teacher − ε_s‖², averaged over pixels (Kim et al., 2023, eq. 2)."""

    def __call__(self, seen: Prediction) -> torch.Tensor:
        """Prediction -> [B]."""
        assert seen.teacher is not None
        return _mean_square(seen.student - seen.teacher)


class FeatureDistillation:
    """‖f_s − f_t[K]‖² / ‖f_t[K]‖², averaged over the blocks.

    Channel i of a pruned layer is channel K_i of the dense one, so the teacher's features need no projection that would
    have to be learned, and its norm makes blocks of any scale count alike.
    """

    def __call__(self, seen: Prediction) -> torch.Tensor:
        """Prediction -> [B]."""
        parts = [_mean_square(student - kept) / _mean_square(kept).clamp_min(1e-12) for student, kept in seen.features]
        return torch.stack(parts).mean(dim=0)


LOSSES: Mapping[str, Loss] = {
    "noise": NoiseLoss(),
    "output": OutputDistillation(),
    "feature": FeatureDistillation(),
}


class Objective:
    """w(t) · Σ_k a_k L_k, and its parts.

    Args:
        scheduler: The noise schedule.
        params: The weights a_k, and γ of w(t) = min(SNR(t), γ) / SNR(t) (Hang et al., 2023, eq. 8, for ε).
    """

    def __init__(self, scheduler: DDPMScheduler, params: LossParams) -> None:
        self.weights = {name: float(getattr(params, name)) for name in LOSSES if getattr(params, name)}
        snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
        self.by_timestep = torch.ones_like(snr) if params.min_snr is None else snr.clamp(max=params.min_snr) / snr

    def __call__(self, seen: Prediction, timesteps: torch.Tensor) -> torch.Tensor:
        """Prediction and its timesteps [B] -> [B]."""
        parts = [weight * LOSSES[name](seen) for name, weight in self.weights.items()]
        return self.by_timestep.to(timesteps.device)[timesteps] * torch.stack(parts).sum(dim=0)


def _mean_square(difference: torch.Tensor) -> torch.Tensor:
    return difference.float().square().flatten(1).mean(dim=1)
