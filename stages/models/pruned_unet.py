"""UNets of any widths for plain diffusers. Every pruned model folder holds a copy; it needs only torch and diffusers.

The config of a pruned model is the config of the dense model and two more keys for the layers that differ from it:
`pruned_widths` (layer -> [outputs, inputs], [channels] for a norm, [rows, columns] for an embedding) and `pruned_heads`
(attention -> heads).
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
Layers = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
Model = TypeVar("Model", bound=nn.Module)


def narrow(model: Model, widths: Mapping[str, Sequence[int]], heads: Mapping[str, int]) -> Model:
    """Replace the parameters of some layers by uninitialized ones of other widths.

    Args:
        model: A diffusers UNet, changed in place.
        widths: Layer name -> the first dimensions of its weight.
        heads: Attention name -> its number of heads.

    Raises:
        AttributeError: The model has no layer of that name.
        TypeError: A layer in `heads` is not an attention.
    """
    for name, width in widths.items():
        layer = model.get_submodule(name)
        for kind, parameter in list(layer.named_parameters(recurse=False)):
            shape = (*width, *parameter.shape[len(width) :]) if kind == "weight" else (width[0],)
            setattr(layer, kind, nn.Parameter(torch.empty(shape, device=parameter.device, dtype=parameter.dtype)))
    for name, num_heads in heads.items():
        attention = model.get_submodule(name)
        if not isinstance(attention, Attention):
            raise TypeError(f"{name} is not an attention layer")
        attention.heads = num_heads
    note_widths(model)
    return model


def note_widths(model: nn.Module) -> None:
    """Set the width attributes of layers and blocks, some of which forward checks, to the shapes of their weights."""
    for module in model.modules():
        _note_layer(module)
    for module in model.modules():
        if isinstance(module, Downsample2D | Upsample2D) and isinstance(module.conv, nn.Conv2d):
            module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels
        elif isinstance(module, ResnetBlock2D):
            _note_resnet(module)
        elif isinstance(module, Attention):
            _note_attention(module)


def _note_layer(module: nn.Module) -> None:
    """Set the widths of a layer with weights."""
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = module.weight.shape[0], module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        module.num_channels = module.weight.shape[0]
    elif isinstance(module, nn.LayerNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape


def _note_resnet(resnet: ResnetBlock2D) -> None:
    """Set the widths of the block and of its up- or downsampler without weights."""
    resnet.in_channels, resnet.out_channels = resnet.conv1.in_channels, resnet.conv2.out_channels
    for sampler in (resnet.upsample, resnet.downsample):
        if isinstance(sampler, Downsample2D | Upsample2D):
            sampler.channels = sampler.out_channels = resnet.in_channels


def _note_attention(attention: Attention) -> None:
    """Set widths and scale; with 1/√(current head width), the default of fused attention, all processors agree."""
    attention.inner_dim, attention.query_dim = attention.to_v.out_features, attention.to_q.in_features
    attention.inner_kv_dim, attention.sliceable_head_dim = attention.inner_dim, attention.heads
    attention.scale = (attention.to_q.out_features // attention.heads) ** -0.5


class _Pruned:
    """Mixin whose from_config builds the dense model and then narrows it."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **kwargs: Any) -> Any:  # noqa: ANN401  # the return type of diffusers
        """Build a model from a dense config with `pruned_widths` and `pruned_heads`."""
        pruned = {key: dict(config.get(key) or {}) for key in PRUNED_KEYS}
        dense = {key: value for key, value in config.items() if key not in (*PRUNED_KEYS, "auto_map")}
        built = super().from_config(dense, **kwargs)  # type: ignore[misc]
        model = built[0] if isinstance(built, tuple) else built
        narrow(model, pruned["pruned_widths"], pruned["pruned_heads"])
        model.register_to_config(**pruned, auto_map=config.get("auto_map"))
        return built


class PrunedUNet2DModel(_Pruned, UNet2DModel):  # type: ignore[misc]  # diffusers' own bases disagree
    """A UNet2DModel whose layers may have any widths."""


class PrunedUNet2DConditionModel(_Pruned, UNet2DConditionModel):  # type: ignore[misc]
    """A UNet2DConditionModel whose layers may have any widths."""
