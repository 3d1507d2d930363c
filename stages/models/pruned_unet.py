"""UNets of any widths for plain diffusers. This file travels with every pruned model: torch and diffusers are enough.

A pruned model's config is that of the dense one and two more keys: `pruned_widths` (layer -> [outputs, inputs], or
[channels] of a norm) and `pruned_heads` (attention -> number of heads), for what differs from the dense.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

PRUNED_KEYS = ("pruned_widths", "pruned_heads")
Layers = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm)
Model = TypeVar("Model", bound=nn.Module)


def narrow(model: Model, widths: Mapping[str, Sequence[int]], heads: Mapping[str, int]) -> Model:
    """Give the layers of a model other widths; their new parameters are empty.

    Args:
        model: A UNet of diffusers, changed in place.
        widths: Layer -> the first dimensions of its weight.
        heads: Attention -> its number of heads.

    Raises:
        AttributeError: The model has no such layer.
        TypeError: What should have heads is no attention.
    """
    for name, width in widths.items():
        layer = model.get_submodule(name)
        for kind, parameter in list(layer.named_parameters(recurse=False)):
            shape = (*width, *parameter.shape[len(width) :]) if kind == "weight" else (width[0],)
            setattr(layer, kind, nn.Parameter(torch.empty(shape, device=parameter.device, dtype=parameter.dtype)))
    for name, num_heads in heads.items():
        attention = model.get_submodule(name)
        if not isinstance(attention, Attention):
            raise TypeError(f"{name} is no attention")
        attention.heads = num_heads
    note_widths(model)
    return model


def note_widths(model: nn.Module) -> None:
    """Make the widths that layers and blocks remember, and partly check in forward, those of their weights."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.GroupNorm):
            module.num_channels = module.weight.shape[0]
        elif isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(module.weight.shape)
    for module in model.modules():
        if isinstance(module, Downsample2D | Upsample2D) and isinstance(module.conv, nn.Conv2d):
            module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels
        elif isinstance(module, ResnetBlock2D):
            _note_resnet(module)
        elif isinstance(module, Attention):
            _note_attention(module)


def _note_resnet(resnet: ResnetBlock2D) -> None:
    """Widths of the block, and of a sampler without weights inside it."""
    resnet.in_channels, resnet.out_channels = resnet.conv1.in_channels, resnet.conv2.out_channels
    for sampler in (resnet.upsample, resnet.downsample):
        if isinstance(sampler, Downsample2D | Upsample2D):
            sampler.channels = sampler.out_channels = resnet.in_channels


def _note_attention(attention: Attention) -> None:
    """Widths, and one scale for every processor: 1/√(current head width), as the fused one has it."""
    attention.inner_dim, attention.query_dim = attention.to_v.out_features, attention.to_q.in_features
    attention.inner_kv_dim, attention.sliceable_head_dim = attention.inner_dim, attention.heads
    attention.scale = (attention.to_q.out_features // attention.heads) ** -0.5


class _Pruned:
    """What from_config does for a pruned model: build the dense one, then narrow it."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **kwargs: Any) -> Any:  # noqa: ANN401  # as diffusers has it
        """Build a model from a dense config with `pruned_widths` and `pruned_heads`."""
        pruned = {key: dict(config.get(key) or {}) for key in PRUNED_KEYS}
        dense = {key: value for key, value in config.items() if key not in (*PRUNED_KEYS, "auto_map")}
        built = super().from_config(dense, **kwargs)  # type: ignore[misc]
        model = built[0] if isinstance(built, tuple) else built
        narrow(model, pruned["pruned_widths"], pruned["pruned_heads"])
        model.register_to_config(**pruned, auto_map=config.get("auto_map"))
        return built


class PrunedUNet2DModel(_Pruned, UNet2DModel):  # type: ignore[misc]  # diffusers' own bases disagree
    """A UNet2DModel with a width of its own for each layer."""


class PrunedUNet2DConditionModel(_Pruned, UNet2DConditionModel):  # type: ignore[misc]
    """A UNet2DConditionModel with a width of its own for each layer."""
