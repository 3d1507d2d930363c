"""A model in training -> its optimizer: Adam, or Muon for the weights of its layers and Adam for all the rest."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from stages.finetune.params import FinetuneParams
from stages.models.families import Denoiser

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weights are matrices from inputs to outputs, which Muon takes; an embedding's is none."""
Moments = dict[str, torch.Tensor]
"""Name of a moment -> its tensor, of one parameter."""


class WeightOptimizer:
    """Adam (Kingma and Ba, 2015) for all parameters, or Muon (Jordan et al., 2024) for the weights of some.

    Those are the weights of linear layers and convolutions; Adam keeps biases, norms, embeddings and other parameters.
    Muon orthogonalises its momentum: every direction of a weight matrix [outputs, inputs · kernel] moves equally far.
    Its steps are scaled to the size of Adam's at the same learning rate (Liu et al., 2025, eq. 4).

    Args:
        unet: The model, on its device and in its memory layout.
        params: The block finetune, of which the learning rates count.
    """

    def __init__(self, unet: Denoiser, params: FinetuneParams) -> None:
        layers = [module for module in unet.modules() if isinstance(module, LAYERS)] if params.muon else []
        weights = dict.fromkeys(layer.weight for layer in layers)  # once each, should layers share one
        self.matrices = {weight: nn.Parameter(_as_matrix(weight.detach())) for weight in weights}
        others = [parameter for parameter in unet.parameters() if parameter not in self.matrices]
        self.parts: dict[str, torch.optim.Optimizer] = {}
        self.rates: dict[str, float] = {}
        if others:
            self.rates["adam"] = params.learning_rate
            self.parts["adam"] = torch.optim.Adam(others, fused=True)
        if params.muon and self.matrices:
            self.rates["muon"] = params.muon.learning_rate
            matrices = list(self.matrices.values())
            self.parts["muon"] = torch.optim.Muon(matrices, weight_decay=0, adjust_lr_fn="match_rms_adamw")

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in [*self.matrices, *self._parameters("adam")]:
            parameter.grad = None

    def step(self, relative_rate: float) -> None:
        """Move the weights by their gradients, at a share of the highest learning rates."""
        for weight, matrix in self.matrices.items():
            matrix.grad = None if weight.grad is None else _as_matrix(weight.grad, like=weight)
        for name, part in self.parts.items():
            for group in part.param_groups:
                group["lr"] = self.rates[name] * relative_rate
            part.step()

    def moments(self) -> dict[str, Moments]:
        """Return the state of every parameter that has one, under the optimizer's name and the parameter's number."""
        return {
            f"{name}.{index}": state
            for name, part in self.parts.items()
            for index, state in part.state_dict()["state"].items()
        }

    def load_moments(self, moments: Mapping[str, Moments]) -> None:
        """Continue from what `moments` returned."""
        for name, part in self.parts.items():
            state = {
                index: {key: _in_layout(it, parameter) for key, it in moments[f"{name}.{index}"].items()}
                for index, parameter in enumerate(self._parameters(name))
                if f"{name}.{index}" in moments
            }
            part.load_state_dict({**part.state_dict(), "state": state})

    def _parameters(self, name: str) -> Iterator[nn.Parameter]:
        for group in self.parts[name].param_groups if name in self.parts else ():
            yield from group["params"]


def _as_matrix(weight: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """Weight [O, I, ...] -> [O, I · kernel], in the order of memory of `like`; a view, if that is its own order."""
    is_plain = (weight if like is None else like).is_contiguous()
    return (weight if is_plain else weight.movedim(1, -1)).flatten(1)


def _in_layout(moment: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return a moment in the memory layout of its parameter; the fused optimizer reads both by position in memory."""
    if moment.shape != parameter.shape:
        return moment  # the number of steps
    return torch.empty_like(parameter, dtype=moment.dtype, device=moment.device).copy_(moment)
