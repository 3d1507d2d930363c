"""A layer's weights and gradients -> saliency: one number a weight, which adds up to the scores of channels.

A channel's score in a layer is |Σ saliency| over the weights of that channel; see docs/method.md for the sources.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Layer = nn.Conv2d | nn.Linear | nn.GroupNorm
Saliency = Callable[[Layer, torch.Tensor], torch.Tensor | None]
"""(layer, gradient of its weight) -> a number for each weight; None where the layer has no say."""


def magnitude(layer: Layer, _: torch.Tensor) -> torch.Tensor | None:
    """w² of convolutions and linear layers."""
    return None if isinstance(layer, nn.GroupNorm) else layer.weight.square()


def signed_taylor(layer: Layer, gradient: torch.Tensor) -> torch.Tensor | None:
    """w·g, so that the weights of a channel may cancel: |Σ_k w_k g_k|."""
    return None if isinstance(layer, nn.GroupNorm) else layer.weight * gradient


def absolute_taylor(layer: Layer, gradient: torch.Tensor) -> torch.Tensor | None:
    """|w·g|: Σ_k |w_k g_k|."""
    return None if isinstance(layer, nn.GroupNorm) else (layer.weight * gradient).abs()


def squared_taylor(layer: Layer, gradient: torch.Tensor) -> torch.Tensor | None:
    """(w·g)² of convolutions and linear layers, |w·g| of GroupNorm."""
    product = layer.weight * gradient
    return product.abs() if isinstance(layer, nn.GroupNorm) else product.square()


def fisher(layer: Layer, gradient: torch.Tensor) -> torch.Tensor | None:
    """(w·g)², g the gradient of one batch: like Theis et al. (2018, eq. 8), who square the gradient of each image."""
    return None if isinstance(layer, nn.GroupNorm) else (layer.weight * gradient).square()


def no_say(_: Layer, __: torch.Tensor) -> torch.Tensor | None:
    """Nothing: random's scores are drawn when the channels are chosen."""
    return None


def ones(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Every timestep alike: ᾱ [T] -> [T]."""
    return torch.ones_like(alphas_cumprod)


def signal_share(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """SNR / (1 + SNR) = ᾱ_t: falls from 1 to 0 with the signal that the noisy image still holds: ᾱ [T] -> [T]."""
    return alphas_cumprod


@dataclass(frozen=True)
class Criterion:
    """One way to tell how much a weight matters."""

    saliency: dict[str, Saliency]
    """By formula."""
    gradients: bool = True
    """Whether it looks at the loss at all."""
    each_timestep: bool = False
    """Whether saliencies of single timesteps are added up, and not gradients, whose signs may cancel."""
    stops: bool = False
    """Whether the sum over the timesteps ends at the threshold."""
    weights: Callable[[torch.Tensor], torch.Tensor] = ones
    """ᾱ [T] -> how much each timestep's gradient counts, [T]."""


CRITERIA = {
    "random": Criterion({"paper": no_say, "diffusers": no_say}, gradients=False),
    "magnitude": Criterion({"paper": magnitude, "diffusers": magnitude}, gradients=False),
    "taylor": Criterion({"paper": squared_taylor, "diffusers": signed_taylor}),
    "diff-pruning": Criterion({"paper": squared_taylor, "diffusers": absolute_taylor}, stops=True),
    "no-cancel-taylor": Criterion(
        {"paper": absolute_taylor, "diffusers": absolute_taylor}, each_timestep=True, stops=True
    ),
    "fisher": Criterion({"paper": fisher, "diffusers": fisher}, each_timestep=True, stops=True),
    "snr-taylor": Criterion({"paper": squared_taylor, "diffusers": absolute_taylor}, weights=signal_share),
}


@dataclass(frozen=True)
class Formula:
    """How one of the original's two engines settles what the paper leaves open."""

    loss: Callable[[torch.Tensor], torch.Tensor]
    """Squared errors [B, C, H, W] -> L_t."""
    keeps_last: bool
    """Whether the timestep that ends the sum still counts."""
    counts_doubled: bool
    """Whether a layer that reads the same channels twice, through a skip, has a say."""


FORMULAS = {
    "paper": Formula(loss=lambda errors: errors.sum(dim=(1, 2, 3)).mean(), keeps_last=False, counts_doubled=False),
    "diffusers": Formula(loss=torch.mean, keeps_last=True, counts_doubled=True),
}
"""paper is ddpm_exp, the code behind the published tables; diffusers is ddpm_prune.py."""
