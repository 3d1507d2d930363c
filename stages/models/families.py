"""The supported model classes: their dense and pruned form, their inputs and their output layer."""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from stages.models.pruned_unet import PrunedUNet2DConditionModel, PrunedUNet2DModel

Denoiser = UNet2DModel | UNet2DConditionModel
Condition = Mapping[str, torch.Tensor]
"""Keyword arguments of a conditional model's forward, besides sample and timestep; empty for other models."""
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Family:
    """One diffusers class that can be pruned."""

    dense: type[Any]
    pruned: type[Any]
    output_layer: str = "conv_out"
    """The layer whose outputs are the prediction (ε, v or x₀); its outputs are never pruned."""


FAMILIES = {
    "UNet2DModel": Family(UNet2DModel, PrunedUNet2DModel),
    "UNet2DConditionModel": Family(UNet2DConditionModel, PrunedUNet2DConditionModel),
}
CLASSES = {cls.__name__: cls for family in FAMILIES.values() for cls in (family.dense, family.pruned)}
"""Class name in a config -> class, dense and pruned."""
AUTOENCODER_CLASSES: dict[str, type[Any]] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
"""Class name in an autoencoder's config -> class."""


def family_name(unet: Denoiser) -> str:
    """Return the key of FAMILIES for a model."""
    return next(name for name, family in FAMILIES.items() if isinstance(unet, family.dense))


def config_defaults(cls: type[Any]) -> dict[str, Any]:
    """Return the default of each key of a diffusers class's config."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


def sample_shape(unet: Denoiser) -> tuple[int, int, int]:
    """Channels, height and width of the samples of a model: images, or latents."""
    size = unet.config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return unet.config["in_channels"], height, width


def example_inputs(unet: Denoiser, batch_size: int = 1) -> dict[str, torch.Tensor]:
    """Build inputs of forward on the model's device: zeros of its size, timestep 0 and, if needed, a zero condition."""
    device = unet.device
    inputs = {
        "sample": torch.zeros(batch_size, *sample_shape(unet), device=device),
        "timestep": torch.zeros(batch_size, device=device).long(),
    }
    if isinstance(unet, UNet2DConditionModel):
        width = unet.config["cross_attention_dim"]
        inputs["encoder_hidden_states"] = torch.zeros(batch_size, 1, width, device=device)
    return inputs


def skeleton(model: Model) -> Model:
    """Copy a model to the meta device, without its weights; enough to count operations and to trace dependencies."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(tensor.to("meta")) if isinstance(tensor, nn.Parameter) else tensor.to("meta")
        for tensor in tensors
    }
    return copy.deepcopy(model, memo)
