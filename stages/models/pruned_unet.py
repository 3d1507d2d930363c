"""UNets of any widths for plain diffusers. Every pruned model folder holds a copy; it needs only torch and diffusers.

The config of a pruned model is the config of the dense model and more keys for what differs from it: `pruned_widths`
(layer -> [outputs, inputs], [channels] for a norm, [rows, columns] for an embedding), `pruned_heads` (attention ->
heads) and, where residual branches were removed, `removed_branches` (their modules).
"""

import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

PRUNED_KEYS = ("pruned_widths", "pruned_heads")
REMOVED_KEY = "removed_branches"
Layers = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
Model = TypeVar("Model", bound=nn.Module)


class Bypass(nn.Module):
    """The shortcut of a module whose residual branch was removed.

    It equals the module with a branch whose output is zero: y = S(x) / scale, where S is the convolution of the
    shortcut, or the identity.

    Args:
        module: A residual block, a self-attention with a residual connection, or a whole transformer.
    """

    conv_shortcut: nn.Module | None

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.conv_shortcut = getattr(module, "conv_shortcut", None)
        scales = (getattr(module, name, 1.0) for name in ("output_scale_factor", "rescale_output_factor"))
        self.scale = math.prod(float(scale) for scale in scales)
        self.returns_tuple = isinstance(module, Transformer2DModel)

    def forward(self, hidden_states: torch.Tensor, *_args: object, **_kwargs: object) -> Any:  # noqa: ANN401  # as diffusers
        """Map x [B, ...] to its shortcut, whatever else the module takes."""
        outputs = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
        outputs = outputs if self.scale == 1 else outputs / self.scale
        return (outputs,) if self.returns_tuple else outputs


def bypass(model: Model, names: Iterable[str]) -> Model:
    """Replace modules by their shortcuts, in place; the weights of their residual branches are gone.

    Raises:
        AttributeError: The model has no module of that name.
        TypeError: The module has no shortcut that maps its input to the shape of its output.
    """
    for name in names:
        module = model.get_submodule(name)
        if not has_shortcut(module):
            raise TypeError(f"{name} has no shortcut that could stay alone")
        replace_module(model, name, Bypass(module))
    return model


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, module)


def has_shortcut(module: nn.Module) -> bool:
    """Whether a module is a branch beside a shortcut that keeps the resolution: its input, or a convolution of it."""
    if isinstance(module, ResnetBlock2D):
        return not (module.up or module.down)
    if isinstance(module, Attention):
        return bool(module.residual_connection)
    return isinstance(module, Transformer2DModel) and bool(module.is_input_continuous)


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
    """Mixin whose from_config builds the dense model, removes branches and then narrows it."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **kwargs: Any) -> Any:  # noqa: ANN401  # the return type of diffusers
        """Build a model from a dense config with `pruned_widths`, `pruned_heads` and perhaps `removed_branches`."""
        pruned: dict[str, Any] = {key: dict(config.get(key) or {}) for key in PRUNED_KEYS}
        removed = list(config.get(REMOVED_KEY) or [])
        dense = {key: value for key, value in config.items() if key not in (*PRUNED_KEYS, REMOVED_KEY, "auto_map")}
        built = super().from_config(dense, **kwargs)  # type: ignore[misc]
        model = built[0] if isinstance(built, tuple) else built
        narrow(bypass(model, removed), pruned["pruned_widths"], pruned["pruned_heads"])
        if removed:
            pruned[REMOVED_KEY] = removed
        model.register_to_config(**pruned, auto_map=config.get("auto_map"))
        model.__module__ = Path(__file__).stem  # which a pipeline that is saved again notes as the place of the class
        return built

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Write config and weights as diffusers does, and beside them this file."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        shutil.copy(__file__, save_directory)


class PrunedUNet2DModel(_Pruned, UNet2DModel):  # type: ignore[misc]  # diffusers' own bases disagree
    """A UNet2DModel whose layers may have any widths and whose residual branches may be gone."""


class PrunedUNet2DConditionModel(_Pruned, UNet2DConditionModel):  # type: ignore[misc]
    """A UNet2DConditionModel whose layers may have any widths and whose residual branches may be gone."""
