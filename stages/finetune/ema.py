"""A model in training -> moving averages of its weights, at several decays side by side."""

import copy
from collections.abc import Mapping, Sequence

from torch.optim.swa_utils import get_ema_multi_avg_fn

from stages.models.families import Denoiser

RAMP = 10
"""After k steps an average reaches back about k / 9 of them, so the first weights are forgotten in short runs too."""


class EmaModels:
    """ē ← d_k · ē + (1 − d_k) · w after step k, with d_k = min(d, (1 + k) / (10 + k)).

    Args:
        unet: The model; every average begins with its weights.
        decays: d of each average.
    """

    def __init__(self, unet: Denoiser, decays: Sequence[float]) -> None:
        self.models: Mapping[float, Denoiser] = {
            decay: copy.deepcopy(unet).eval().requires_grad_(requires_grad=False) for decay in decays
        }

    def update(self, unet: Denoiser, step: int) -> None:
        """Move each average towards the weights after a step, counted from 1."""
        current = list(unet.parameters())
        for decay, model in self.models.items():
            now = min(decay, (1 + step) / (RAMP + step))
            get_ema_multi_avg_fn(now)(list(model.parameters()), current, step)
