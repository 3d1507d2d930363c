"""A class of model -> what the program must know of it: how to build it, what it takes, where its noise comes from."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from stages.models.pruned_unet import PrunedUNet2DConditionModel, PrunedUNet2DModel

Denoiser = UNet2DModel | UNet2DConditionModel
Condition = Mapping[str, torch.Tensor]
"""What a conditional model takes beside image and timestep, by the names of its forward; empty for others."""
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Family:
    """One class of diffusers that can be pruned."""

    dense: type[Any]
    pruned: type[Any]
    last: str = "conv_out"
    """The layer whose outputs are the noise: they stay."""


FAMILIES = {
    "UNet2DModel": Family(UNet2DModel, PrunedUNet2DModel),
    "UNet2DConditionModel": Family(UNet2DConditionModel, PrunedUNet2DConditionModel),
}


def family_name(unet: Denoiser) -> str:
    """Name the family that a model belongs to."""
    return next(name for name, family in FAMILIES.items() if isinstance(unet, family.dense))


def sample_shape(unet: Denoiser) -> tuple[int, int, int]:
    """Channels, height and width of what a model draws: pictures, or latents."""
    return unet.config["in_channels"], unet.config["sample_size"], unet.config["sample_size"]


def example_inputs(unet: Denoiser, batch_size: int = 1) -> dict[str, torch.Tensor]:
    """Zeros of the model's size, timestep 0 and a condition where it takes one, on the model's device."""
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
    """Copy a model without its weights, onto the meta device: enough to count and to trace."""
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(tensor.to("meta")) if isinstance(tensor, nn.Parameter) else tensor.to("meta")
        for tensor in tensors
    }
    return copy.deepcopy(model, memo)
