"""A layer's weights and gradients -> its saliency: one number per weight, summed up to the scores of channels.

A channel's score in a layer is |Σ saliency| over the weights of that channel; see docs/method.md for the sources.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn

from stages.models.params import FormulaName

Layer = nn.Conv2d | nn.Linear | nn.GroupNorm
Saliency = Callable[[Layer, torch.Tensor], torch.Tensor | None]
"""(layer, gradient of its weight) -> tensor of the weight's shape; None if the layer does not count."""


def magnitude(layer: Layer, _: torch.Tensor) -> torch.Tensor | None:
    """w², for convolutions and linear layers."""
    return None if isinstance(layer, nn.GroupNorm) else layer.weight.square()


def signed_taylor(layer: Layer, gradient: torch.Tensor) -> torch.Tensor | None:
    """w·g, so that the weights of a channel can cancel: |Σ_k w_k g_k|."""
    return None if isinstance(layer, nn.GroupNorm) else layer.weight * gradient


def absolute_taylor(layer: Layer, gradient: torch.Tensor) -> torch.Tensor | None:
    """|w·g|, without cancellation: Σ_k |w_k g_k|."""
    return None if isinstance(layer, nn.GroupNorm) else (layer.weight * gradient).abs()


def squared_taylor(layer: Layer, gradient: torch.Tensor) -> torch.Tensor | None:
    """(w·g)² for convolutions and linear layers, |w·g| for GroupNorm."""
    product = layer.weight * gradient
    return product.abs() if isinstance(layer, nn.GroupNorm) else product.square()


def fisher(layer: Layer, gradient: torch.Tensor) -> torch.Tensor | None:
    """(w·g)² with the gradient of one batch; Theis et al. (2018, eq. 8) square the gradient of each image instead."""
    return None if isinstance(layer, nn.GroupNorm) else (layer.weight * gradient).square()


def signed_taylor_with_norms(layer: Layer, gradient: torch.Tensor) -> torch.Tensor | None:
    """w·g for convolutions, linear layers and GroupNorm."""
    return layer.weight * gradient


def absolute_taylor_with_norms(layer: Layer, gradient: torch.Tensor) -> torch.Tensor | None:
    """|w·g| for convolutions, linear layers and GroupNorm."""
    return (layer.weight * gradient).abs()


def no_saliency(_: Layer, __: torch.Tensor) -> torch.Tensor | None:
    """None; the scores of `random` are drawn when the channels are selected."""
    return None


def uniform(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """The weight 1 for every timestep: ᾱ [T] -> [T]."""
    return torch.ones_like(alphas_cumprod)


def signal_share(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """The weight SNR / (1 + SNR) = ᾱ_t, the share of signal in the noisy image: ᾱ [T] -> [T]."""
    return alphas_cumprod


FORMULA_NAMES = get_args(FormulaName)


@dataclass(frozen=True)
class Criterion:
    """A definition of how important a weight is."""

    saliency: dict[str, Saliency]
    """Formula -> saliency of a layer."""
    needs_gradients: bool = True
    """Whether it depends on the loss."""
    per_timestep: bool = False
    """Whether it sums the saliencies of single timesteps; otherwise it sums gradients, whose signs can cancel."""
    has_threshold: bool = False
    """Whether the sum over timesteps ends at the threshold."""
    weights: Callable[[torch.Tensor], torch.Tensor] = uniform
    """ᾱ [T] -> the weight of each timestep's loss, [T]."""


CRITERIA = {
    "random": Criterion(dict.fromkeys(FORMULA_NAMES, no_saliency), needs_gradients=False),
    "magnitude": Criterion(dict.fromkeys(FORMULA_NAMES, magnitude), needs_gradients=False),
    "taylor": Criterion({"paper": squared_taylor, "diffusers": signed_taylor, "ldm": signed_taylor_with_norms}),
    "diff-pruning": Criterion(
        {"paper": squared_taylor, "diffusers": absolute_taylor, "ldm": absolute_taylor_with_norms}, has_threshold=True
    ),
    "no-cancel-taylor": Criterion(
        {"paper": absolute_taylor, "diffusers": absolute_taylor, "ldm": absolute_taylor_with_norms},
        per_timestep=True,
        has_threshold=True,
    ),
    "fisher": Criterion(dict.fromkeys(FORMULA_NAMES, fisher), per_timestep=True, has_threshold=True),
    "snr-taylor": Criterion(
        {"paper": squared_taylor, "diffusers": absolute_taylor, "ldm": absolute_taylor_with_norms},
        weights=signal_share,
    ),
}
"""Value of importance.criterion -> its definition."""


@dataclass(frozen=True)
class Formula:
    """Details that the paper leaves open, as one implementation of Diff-Pruning has them."""

    loss: Callable[[torch.Tensor], torch.Tensor]
    """Squared errors [B, C, H, W] -> L_t, a scalar."""
    includes_last: bool
    """Whether the timestep whose loss is below the threshold is still included."""
    counts_doubled: bool
    """Whether a layer that reads the same channels twice, through a skip connection, counts."""


FORMULAS = {
    "paper": Formula(loss=lambda errors: errors.sum(dim=(1, 2, 3)).mean(), includes_last=False, counts_doubled=False),
    "diffusers": Formula(loss=torch.mean, includes_last=True, counts_doubled=True),
    "ldm": Formula(loss=torch.mean, includes_last=False, counts_doubled=False),
}
"""paper: ddpm_exp, which produced the published tables. diffusers: ddpm_prune.py. ldm: ldm_exp, for LDM-4."""
