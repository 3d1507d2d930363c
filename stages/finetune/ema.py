"""A model in training -> exponential moving averages (EMA) of its weights, one for each decay."""

import copy
from collections.abc import Mapping, Sequence

from torch.optim.swa_utils import get_ema_multi_avg_fn

from stages.finetune.buffers import copy_buffers
from stages.models.families import Denoiser

RAMP = 10
"""After k steps an EMA spans about k / 9 of them, so that short runs forget their first weights too."""


class EmaModels:
    """ē ← d_k · ē + (1 − d_k) · w after step k, with d_k = min(d, (1 + k) / (10 + k)).

    Args:
        unet: The model; every EMA starts from its weights.
        decays: d of each EMA.
    """

    def __init__(self, unet: Denoiser, decays: Sequence[float]) -> None:
        self.models: Mapping[float, Denoiser] = {
            decay: copy.deepcopy(unet).eval().requires_grad_(requires_grad=False) for decay in decays
        }

    def update(self, unet: Denoiser, step: int) -> None:
        """Update every EMA with the weights after `step`, counted from 1; buffers are copied, such as a norm's."""
        weights = list(unet.parameters())
        for decay, model in self.models.items():
            ramped = min(decay, (1 + step) / (RAMP + step))
            get_ema_multi_avg_fn(ramped)(list(model.parameters()), weights, step)
            copy_buffers(unet, model)
