"""The supported families of models, and what is computed with a model of any of them."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from torch import nn

from stages.models.families.dit import DiT
from stages.models.families.family import Denoiser, Family, config_defaults
from stages.models.families.own import OWN
from stages.models.families.unet_2d import UNet2D
from stages.models.families.unet_2d_condition import ConditionalUNet2D
from stages.models.pruned_own import CLASS_KEY

__all__ = [
    "AUTOENCODER_CLASSES",
    "CLASSES",
    "FAMILIES",
    "KNOWN",
    "OWN",
    "Condition",
    "Denoiser",
    "Family",
    "config_defaults",
    "config_shape",
    "example_inputs",
    "family_name",
    "family_of",
    "find_family",
    "forward",
    "has_features",
    "learns_variance",
    "prediction",
    "sample_shape",
    "skeleton",
]

Condition = Mapping[str, torch.Tensor]
"""Keyword arguments of a conditional model's forward, besides sample and timestep; empty for other models."""
Model = TypeVar("Model", bound=nn.Module)

KNOWN = (UNet2D(), ConditionalUNet2D(), DiT())
"""The families of classes of diffusers."""
FAMILIES: dict[str, Family] = {family.name: family for family in (*KNOWN, OWN)}
CLASSES = {
    **{name: family.dense for family in FAMILIES.values() for name in (family.name, *family.aliases)},
    **{family.pruned_name: family.pruned for family in FAMILIES.values()},
}
"""Class name in a config -> class, dense or pruned."""
AUTOENCODER_CLASSES: dict[str, type[Any]] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
"""Class name in an autoencoder's config -> class."""


def find_family(config: Mapping[str, Any]) -> Family | None:
    """Return the family of a config of a dense or pruned model; None for other classes."""
    name = config.get("_class_name")
    families = FAMILIES.values()
    return next((it for it in families if name in (it.name, it.pruned_name, *it.aliases)), None)


def family_of(unet: nn.Module) -> Family:
    """Return the family of a model, dense or pruned; an own class may have one of diffusers as its base."""
    return next(family for family in (OWN, *KNOWN) if isinstance(unet, family.dense))


def family_name(unet: Denoiser) -> str:
    """Return what plans call the family of a model."""
    return family_of(unet).identity(unet)


def sample_shape(unet: Denoiser) -> tuple[int, int, int]:
    """Channels, height and width of the samples of a model: images, or latents."""
    return config_shape(unet.config)


def config_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Channels, height and width of the samples of a model with this config."""
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return config["in_channels"], height, width


def example_inputs(unet: Denoiser, batch_size: int = 1) -> dict[str, torch.Tensor]:
    """Build inputs for `forward` on the model's device: zeros of its size, timestep 0 and, if needed, a condition."""
    device = unet.device
    return {
        "sample": torch.zeros(batch_size, *sample_shape(unet), device=device),
        "timestep": torch.zeros(batch_size, device=device).long(),
        **family_of(unet).example_condition(unet, batch_size),
    }


def forward(unet: Denoiser, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Run a model on inputs like those of `example_inputs`, whatever it calls the sample; returns its prediction."""
    rest = {name: value for name, value in inputs.items() if name != "sample"}
    return prediction(unet(inputs["sample"], **rest).sample, unet)


def prediction(output: torch.Tensor, unet: Denoiser) -> torch.Tensor:
    """Return what a model predicts (ε, v or x₀) of its output: all of it, or the half beside a learned variance."""
    channels: int = unet.config["in_channels"]
    return output if output.shape[1] == channels else output[:, :channels]


def learns_variance(unet: Denoiser) -> bool:
    """Whether the second half of a model's output is its variance; an own class gives the prediction alone."""
    config = unet.config
    return CLASS_KEY not in config and bool(config["out_channels"] == 2 * config["in_channels"])


def has_features(unet: Denoiser) -> bool:
    """Whether features of a model can be distilled."""
    return bool(family_of(unet).feature_blocks(unet))


def skeleton(model: Model) -> Model:
    """Copy a model to the meta device, without its weights; enough to count operations and to trace dependencies."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(tensor.to("meta")) if isinstance(tensor, nn.Parameter) else tensor.to("meta")
        for tensor in tensors
    }
    return copy.deepcopy(model, memo)
