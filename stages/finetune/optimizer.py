"""A model in training -> its optimiser: Adam, or Muon for the weights of its layers and Adam for all the rest."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from stages.finetune.params import FinetuneParams
from stages.models.families import Denoiser

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers whose weights are matrices from inputs to outputs, which Muon takes; an embedding's is none."""
MOMENTUM = 0.95
POLYNOMIAL = 3.4445, -4.7750, 2.0315
"""a, b, c of the iteration a·X + (b·X Xᵀ + c·(X Xᵀ)²) X, after which singular values lie between .7 and 1.2."""
ITERATIONS = 5
RMS = 0.2
"""Root mean square of Adam's steps, relative to the learning rate."""
Moments = dict[str, torch.Tensor]
"""Name of a moment -> its tensor, of one parameter."""


class Muon(torch.optim.Optimizer):
    """Momentum, of which every direction of a weight's matrix [outputs, inputs · kernel] moves equally far.

    By Jordan et al. (2024), with Nesterov's momentum and without weight decay; steps are scaled to the size of Adam's
    at the same learning rate (Liu et al., 2025, arXiv 2502.16982). `torch.optim.Muon` takes matrices alone, and
    computes in bfloat16, in which the order of a sum changes a step by more than its last bits.

    Args:
        weights: Weights of two or more dimensions.
    """

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        super().__init__(weights, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002  # no closure
        """Move the weights by their gradients."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    step = orthogonalise(self._direction(weight, weight.grad).flatten(1))
                    step = step.where(weight.grad.any(), 0)  # what is left of the momentum would be a full step
                    weight.add_(step.view(weight.shape), alpha=-group["lr"] * RMS * max(step.shape) ** 0.5)

    def _direction(self, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Update the momentum, and look ahead by one more of its steps."""
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(state["momentum"], MOMENTUM)


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """U S Vᵀ -> about U Vᵀ, by Newton and Schulz's iteration; zero stays zero: [M, N] float32."""
    a, b, c = POLYNOMIAL
    is_tall = matrix.shape[0] > matrix.shape[1]
    found: torch.Tensor = (matrix.T if is_tall else matrix) / matrix.norm().clamp_min(1e-30)
    for _ in range(ITERATIONS):
        square = found @ found.T
        found = torch.addmm(found, torch.addmm(square, square, square, beta=b, alpha=c), found, beta=a)
    return found.T.contiguous() if is_tall else found


def layer_weights(unet: nn.Module) -> list[torch.Tensor]:
    """List the weights that Muon takes, once each, should layers share one."""
    return list(dict.fromkeys(module.weight for module in unet.modules() if isinstance(module, LAYERS)))


def muon_macs(unet: nn.Module) -> int:
    """Count the multiply-accumulates of one step of Muon: 5 · (2·m²·n + m³) for a matrix [m, n], m ≤ n."""
    sides = (sorted(weight.flatten(1).shape) for weight in layer_weights(unet))
    return sum(ITERATIONS * (2 * m * m * n + m**3) for m, n in sides)


class WeightOptimizer:
    """Adam (Kingma and Ba, 2015) for all parameters, or `Muon` for the weights of some.

    Those are the weights of linear layers and convolutions; Adam keeps biases, norms, embeddings and other parameters.

    Args:
        unet: The model, on its device and in its memory layout.
        params: The block finetune, of which the learning rates count.
    """

    def __init__(self, unet: Denoiser, params: FinetuneParams) -> None:
        weights = layer_weights(unet) if params.muon else []
        others = [parameter for parameter in unet.parameters() if parameter not in {*weights}]
        self.parts: dict[str, torch.optim.Optimizer] = {}
        self.rates = {"adam": params.learning_rate}
        if others:
            self.parts["adam"] = torch.optim.Adam(others, fused=True)
        if params.muon and weights:
            self.rates["muon"] = params.muon.learning_rate
            self.parts["muon"] = Muon(weights)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts.values():
            part.zero_grad()

    def step(self, relative_rate: float) -> None:
        """Move the weights by their gradients, at a share of the highest learning rates."""
        for name, part in self.parts.items():
            for group in part.param_groups:
                group["lr"] = self.rates[name] * relative_rate
            part.step()

    def moments(self) -> dict[str, Moments]:
        """Return the state of every parameter that has one, under the optimiser's name and the parameter's number."""
        return {
            f"{name}.{index}": state
            for name, part in self.parts.items()
            for index, state in part.state_dict()["state"].items()
        }

    def load_moments(self, moments: Mapping[str, Moments]) -> None:
        """Continue from what `moments` returned."""
        for name, part in self.parts.items():
            parameters = [parameter for group in part.param_groups for parameter in group["params"]]
            state = {
                index: {key: _in_layout(it, parameter) for key, it in moments[f"{name}.{index}"].items()}
                for index, parameter in enumerate(parameters)
                if f"{name}.{index}" in moments
            }
            part.load_state_dict({**part.state_dict(), "state": state})


def _in_layout(moment: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Return a moment in the memory layout of its parameter; the fused optimiser reads both by position in memory."""
    if moment.shape != parameter.shape:
        return moment  # the number of steps
    return torch.empty_like(parameter, dtype=moment.dtype, device=moment.device).copy_(moment)
