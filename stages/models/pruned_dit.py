"""DiT of any widths for plain diffusers. Every pruned model folder holds a copy; it needs only torch and diffusers.

The config of a pruned model is the config of the dense model and more keys for what differs from it: `pruned_widths`
(layer -> [outputs, inputs]), `pruned_heads` (attention -> heads) and, where blocks were removed, `removed_branches`
(their names). Feed-forward networks may have any hidden width, and attentions any number and width of heads; the width
between the blocks is that of the dense model.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import nn

PRUNED_KEYS = ("pruned_widths", "pruned_heads")
REMOVED_KEY = "removed_branches"
FIRST_BLOCK = "transformer_blocks.0"


class Bypass(nn.Module):
    """A removed block: its input is its output."""

    def __init__(self, _block: nn.Module) -> None:
        super().__init__()

    def forward(self, hidden_states: torch.Tensor, *_args: object, **_kwargs: object) -> torch.Tensor:
        """Return x [B, N, C] as it is, whatever else the block takes."""
        return hidden_states


def can_go(name: str, module: nn.Module) -> bool:
    """Whether a module is a block that can be removed: not the first, whose embedding the output layer reads."""
    return isinstance(module, BasicTransformerBlock) and name != FIRST_BLOCK


class PrunedDiTTransformer2DModel(DiTTransformer2DModel):
    """A DiTTransformer2DModel whose blocks may have any widths, or be gone."""

    @classmethod
    def from_config(  # type: ignore[override]  # diffusers' own annotation is of one class
        cls,
        config: Mapping[str, Any],
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401  # the return type of diffusers
        """Build a model from a dense config with `pruned_widths`, `pruned_heads` and perhaps `removed_branches`."""
        pruned: dict[str, Any] = {key: dict(config.get(key) or {}) for key in PRUNED_KEYS}
        removed = list(config.get(REMOVED_KEY) or [])
        dense = {key: value for key, value in config.items() if key not in (*PRUNED_KEYS, REMOVED_KEY, "auto_map")}
        built = super().from_config(dense, **kwargs)
        model = built[0] if isinstance(built, tuple) else built
        for name in removed:
            _remove(model, name)
        for name, (outputs, inputs) in pruned["pruned_widths"].items():
            _narrow(model.get_submodule(name), outputs, inputs)
        for module in model.modules():
            if isinstance(module, Attention):
                _note_heads(module, module.heads)
        for name, heads in pruned["pruned_heads"].items():
            _note_heads(model.get_submodule(name), heads)
        if removed:
            pruned[REMOVED_KEY] = removed
        model.register_to_config(**pruned, auto_map=config.get("auto_map"))  # type: ignore[no-untyped-call]
        model.__module__ = Path(__file__).stem  # which a pipeline that is saved again notes as the place of the class
        return built

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Write config and weights as diffusers does, and beside them this file."""
        super().save_pretrained(save_directory, *args, **kwargs)
        shutil.copy(__file__, save_directory)

    def forward(  # type: ignore[override]  # any tensors, and the two inputs are needed
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,  # noqa: FBT001, FBT002  # as in diffusers
    ) -> Any:  # noqa: ANN401  # the return type of diffusers
        """Predict as the dense class does; one timestep may stand for all images, as UNets and samplers have it."""
        timestep = timestep.to(hidden_states.device).reshape(-1)
        rest = class_labels, cross_attention_kwargs, return_dict
        return super().forward(hidden_states, timestep, *rest)  # type: ignore[arg-type]  # narrow annotations


def _remove(model: nn.Module, name: str) -> None:
    """Replace a block by its input.

    Raises:
        TypeError: The module is not a block that can go.
    """
    if not can_go(name, model.get_submodule(name)):
        raise TypeError(f"{name} is not a block that can be removed")
    parent, _, index = name.rpartition(".")
    setattr(model.get_submodule(parent), index, Bypass(model.get_submodule(name)))


def _narrow(layer: nn.Module, outputs: int, inputs: int) -> None:
    """Replace the parameters of a linear layer by uninitialized ones of other widths.

    Raises:
        TypeError: The layer is not a linear one.
    """
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"a {type(layer).__name__} cannot be narrowed")
    layer.out_features, layer.in_features = outputs, inputs
    for kind, shape in (("weight", (outputs, inputs)), ("bias", (outputs,))):
        if (old := getattr(layer, kind)) is not None:
            setattr(layer, kind, nn.Parameter(torch.empty(shape, device=old.device, dtype=old.dtype)))


def _note_heads(attention: nn.Module, heads: int) -> None:
    """Set heads, widths and scale; with 1/√(current head width), the default of fused attention, all processors agree.

    Raises:
        TypeError: The module is not an attention.
    """
    if not isinstance(attention, Attention):
        raise TypeError(f"a {type(attention).__name__} has no heads")
    attention.heads = attention.sliceable_head_dim = heads
    attention.inner_dim = attention.inner_kv_dim = attention.to_v.out_features
    attention.scale = (attention.to_q.out_features // heads) ** -0.5
