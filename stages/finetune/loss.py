"""Predictions of student and teacher -> the training loss of each image."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.finetune.params import LossParams
from stages.models.prediction_types import min_snr_weights
from stages.runtime.errors import InputError


@dataclass(frozen=True)
class Prediction:
    """The target of a batch, and what the models computed from the noisy images."""

    target: torch.Tensor
    """y, what the models should predict: ε, v or x₀, [B, C, H, W]."""
    student: torch.Tensor
    """y predicted by the pruned model: [B, C, H, W]."""
    teacher: torch.Tensor | None = None
    """y predicted by the dense model: [B, C, H, W]; None without distillation."""
    features: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    """(student, teacher) features of each block, of the same channels: [B, K, H, W]."""


class Loss(Protocol):
    """Common interface of the losses."""

    def __call__(self, prediction: Prediction) -> torch.Tensor:
        """Prediction -> [B]."""
        ...


class NoiseLoss:
    """‖y − y_s‖², averaged over pixels (Ho et al., 2020, eq. 14, for y = ε)."""

    def __call__(self, prediction: Prediction) -> torch.Tensor:
        """Prediction -> [B]."""
        return _mean_square(prediction.student - prediction.target)


class OutputDistillation:
    """‖y_teacher − y_s‖², averaged over pixels (Kim et al., 2023, eq. 2, for y = ε)."""

    def __call__(self, prediction: Prediction) -> torch.Tensor:
        """Prediction -> [B]."""
        assert prediction.teacher is not None
        return _mean_square(prediction.student - prediction.teacher)


class FeatureDistillation:
    """‖f_s − f_t[K]‖² / ‖f_t[K]‖², averaged over the blocks.

    Channel i of a pruned layer is channel K_i of the dense one, so the teacher's features need no learned projection.
    The norm gives blocks of any scale the same weight.
    """

    def __call__(self, prediction: Prediction) -> torch.Tensor:
        """Prediction -> [B].

        Raises:
            InputError: Features of a block differ in shape, so that the description of an own class does not fit.
        """
        for student, teacher in prediction.features:
            if student.shape != teacher.shape:
                shapes = f"{list(student.shape)} in the cut model and {list(teacher.shape)} in the dense one"
                remedy = "correct features in denoiser.json: a block, and the layer whose channels it has"
                raise InputError(f"features of a block are {shapes}; {remedy}")
        ratios = [
            _mean_square(student - teacher) / _mean_square(teacher).clamp_min(1e-12)
            for student, teacher in prediction.features
        ]
        return torch.stack(ratios).mean(dim=0)


LOSSES: Mapping[str, Loss] = {
    "noise": NoiseLoss(),
    "output": OutputDistillation(),
    "feature": FeatureDistillation(),
}
"""Key of finetune.loss that holds the weight -> the loss."""


class Objective:
    """w(t) · Σ_k a_k L_k.

    Args:
        scheduler: The noise schedule.
        params: The weights a_k, and γ of the min-SNR weights w(t); w(t) = 1 without γ.

    Raises:
        InputError: w(t) would be 0 at the last timestep, where the output alone decides how sampling begins.
    """

    def __init__(self, scheduler: DDPMScheduler, params: LossParams) -> None:
        self.weights = {name: float(getattr(params, name)) for name in LOSSES if getattr(params, name)}
        gamma, equal = params.min_snr, torch.ones_like(scheduler.alphas_cumprod)
        if gamma is not None and not scheduler.alphas_cumprod.all():
            found = f"finetune.loss.min_snr is {gamma:g}, and the model's schedule ends without any image (SNR 0)"
            raise InputError(f"{found}: its last timesteps would not be trained; set min_snr to null")
        self.by_timestep = equal if gamma is None else min_snr_weights(scheduler, gamma)

    def __call__(self, prediction: Prediction, timesteps: torch.Tensor) -> torch.Tensor:
        """Prediction and its timesteps [B] -> [B]."""
        parts = [weight * LOSSES[name](prediction) for name, weight in self.weights.items()]
        if self.weights.keys() == {"feature"}:  # several processes wait for a gradient of the last layer
            parts.append(0 * prediction.student.float().flatten(1).sum(dim=1))
        return self.weights_at(timesteps) * torch.stack(parts).sum(dim=0)

    def weights_at(self, timesteps: torch.Tensor) -> torch.Tensor:
        """w(t) of timesteps [B]: [B]."""
        self.by_timestep = self.by_timestep.to(timesteps.device)  # copied once, not at every step
        return self.by_timestep[timesteps]


def _mean_square(difference: torch.Tensor) -> torch.Tensor:
    return difference.float().square().flatten(1).mean(dim=1)
