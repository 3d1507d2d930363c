"""A layer's weights and gradients -> saliency: one number a weight, which the prune stage adds up to channels.

A channel's score in a layer is |Σ saliency| over the weights of that channel; see docs/method.md for the sources.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Layer = nn.Conv2d | nn.Linear | nn.GroupNorm
Saliency = Callable[[Layer], torch.Tensor | None]


def magnitude(layer: Layer) -> torch.Tensor | None:
    """w² of convolutions and linear layers."""
    return None if isinstance(layer, nn.GroupNorm) else layer.weight.square()


def signed_taylor(layer: Layer) -> torch.Tensor | None:
    """w·g, so that the weights of a channel may cancel: |Σ_k w_k g_k|."""
    return None if isinstance(layer, nn.GroupNorm) else layer.weight * _gradient(layer)


def absolute_taylor(layer: Layer) -> torch.Tensor | None:
    """|w·g|: Σ_k |w_k g_k|."""
    return None if isinstance(layer, nn.GroupNorm) else (layer.weight * _gradient(layer)).abs()


def squared_taylor(layer: Layer) -> torch.Tensor | None:
    """(w·g)² of convolutions and linear layers, |w·g| of GroupNorm."""
    product = layer.weight * _gradient(layer)
    return product.abs() if isinstance(layer, nn.GroupNorm) else product.square()


def _gradient(layer: Layer) -> torch.Tensor:
    gradient = layer.weight.grad
    return torch.zeros_like(layer.weight) if gradient is None else gradient


@dataclass(frozen=True)
class Engine:
    """How one of the original's two engines settles what the paper leaves open."""

    loss: Callable[[torch.Tensor], torch.Tensor]
    """Squared errors [B, C, H, W] -> L_t."""
    keeps_last: bool
    """Whether the timestep that ends the sum still counts."""
    counts_doubled: bool
    """Whether a layer that reads the same channels twice, through a skip, has a say."""
    saliency: dict[str, Saliency]
    """By criterion; random has none, its scores are drawn when the channels are chosen."""


ENGINES = {
    "paper": Engine(
        loss=lambda errors: errors.sum(dim=(1, 2, 3)).mean(),
        keeps_last=False,
        counts_doubled=False,
        saliency={"magnitude": magnitude, "taylor": squared_taylor, "diff-pruning": squared_taylor},
    ),
    "diffusers": Engine(
        loss=torch.mean,
        keeps_last=True,
        counts_doubled=True,
        saliency={"magnitude": magnitude, "taylor": signed_taylor, "diff-pruning": absolute_taylor},
    ),
}
"""paper is ddpm_exp, the code behind the published tables; diffusers is ddpm_prune.py."""
