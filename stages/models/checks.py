"""Checks that a model is supported and intact, and that images and conditions fit it."""

import math
import re
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from numpy.typing import NDArray
from torch import nn

from stages.data.images import Conditions
from stages.models.families import CLASSES, FAMILIES, Denoiser, config_defaults
from stages.runtime.errors import InputError

LABELS = "class labels; supported: none, or cross-attention"
CONDITIONS = "further conditions; supported: encoder_hidden_states alone"
UNSUPPORTED_CONDITIONS = {
    "num_class_embeds": LABELS,
    "class_embed_type": LABELS,
    "addition_embed_type": CONDITIONS,
    "encoder_hid_dim_type": CONDITIONS,
    "encoder_hid_dim": CONDITIONS,
    "time_cond_proj_dim": CONDITIONS,
}
"""Key of a UNet's config -> the conditions that it adds."""
MAX_SIDE = 4096
"""Largest height and width of the samples."""
MAX_BLOCKS, MAX_LAYERS, MAX_WIDTH = 64, 256, 1_000_000
"""Largest length of a list in a config, of a number of layers, and of any other number."""
UNSUPPORTED_BLOCKS = {
    "SimpleCrossAttn": "attention with added keys and values, whose channels cannot be cut together",
    "K": "norms whose scale and shift depend on the timestep, whose channels cannot be cut together",
}
"""Beginning of a block's type -> what it holds."""


def check_supported(config: Mapping[str, Any], origin: Path) -> None:
    """Check that this version can sample from, train and prune a model with this config.

    Raises:
        InputError: The class is not supported, the model takes class labels or further conditions, has blocks that
            cannot be cut, its output does not have the input's shape, or the size of its samples is not known.
    """
    name = str(config.get("_class_name"))
    if name not in CLASSES:
        found = f"{origin} describes a {config.get('_class_name')}"
        raise InputError(f"{found}; supported: {', '.join(FAMILIES)} (docs/models.md)")
    defaults = config_defaults(CLASSES[name])
    config = {**defaults, **config}
    check_sizes(config, defaults, origin)
    for key, reason in UNSUPPORTED_CONDITIONS.items():
        if config.get(key) is not None:
            raise InputError(f"{origin} describes a model with {reason} ({key} is {config[key]!r})")
    _check_channels(config["in_channels"], config["out_channels"], origin)
    if not isinstance(config["block_out_channels"], list | tuple) or not config["block_out_channels"]:
        found = f"{origin} has block_out_channels {config['block_out_channels']!r}"
        raise InputError(f"{found}; supported: a list of one width a block")
    _check_blocks(config, origin)
    if type(config.get("cross_attention_dim", 1)) is not int:
        raise InputError(f"{origin} has cross_attention_dim {config['cross_attention_dim']!r}; supported: one integer")
    size = config.get("sample_size")
    lengths = size if isinstance(size, list | tuple) and len(size) == 2 else (size,)  # noqa: PLR2004
    if not all(type(length) is int and 0 < length <= MAX_SIDE for length in lengths):
        found = f"{origin} has sample_size {size!r}"
        allowed = f"one positive integer, for square images, or [height, width]; at most {MAX_SIDE}"
        raise InputError(f"{found}; supported: {allowed}")


def check_sizes(config: Mapping[str, Any], known: Collection[str], origin: Path) -> None:
    """Bound the numbers under the known keys of a config, since diffusers builds as many layers as they say.

    Raises:
        InputError: A number or list is too large; its key is named.
    """
    for key in known:
        limit = MAX_LAYERS if "layers" in key else MAX_WIDTH
        level = [config.get(key)]
        while level:
            if any(isinstance(item, int | float) and abs(item) > limit for item in level):
                raise InputError(f"{origin} has {key} {reprlib.repr(config[key])}; supported: at most {limit}")
            lists = [item for item in level if isinstance(item, list | tuple)]
            if any(len(items) > MAX_BLOCKS for items in lists):
                raise InputError(f"{origin} has more than {MAX_BLOCKS} values in {key}, the limit; use another model")
            level = [item for items in lists for item in items]


def check_layers(config: Mapping[str, Any], num_tensors: int, origin: str) -> None:
    """Compare the number of layers with that of the tensors, before they are built.

    Raises:
        InputError: The weights cannot hold that many layers.
    """
    counts = [_largest(config.get(key)) for key in ("layers_per_block", "transformer_layers_per_block")]
    if math.prod(counts) > num_tensors:
        found = f"the config describes {math.prod(counts)} layers or more, the weights {num_tensors} tensors"
        raise InputError(f"{origin}: {found}; use the weights of this config")


def _largest(value: object) -> int:
    """Return the largest number in nested lists, at least 1."""
    if isinstance(value, list | tuple):
        return max((_largest(item) for item in value), default=1)
    return max(value, 1) if isinstance(value, int) else 1


def _check_channels(inputs: object, outputs: object, origin: Path) -> None:
    """Check that a model has as many output as input channels.

    Raises:
        InputError: The numbers differ; the reason says what further channels usually are.
    """
    if inputs == outputs:
        return
    reason = "no others"
    if isinstance(inputs, int) and isinstance(outputs, int):
        if outputs == 2 * inputs:
            reason = "no learned variance, which the second half of out_channels is"
        elif inputs > outputs:
            reason = "no fixed condition, as the further in_channels of inpainting or super-resolution are"
    sides = f"{inputs} input and {outputs} output channels"
    found = f"in_channels is {inputs}, out_channels {outputs}"
    raise InputError(f"{origin} describes a model with {sides}; supported: equal numbers ({found}; {reason})")


def _check_blocks(config: Mapping[str, Any], origin: Path) -> None:
    """Check the types of blocks, of attention and of the timestep's embedding.

    Raises:
        InputError: A type is not supported; its key is named.
    """
    for key in ("down_block_types", "mid_block_type", "up_block_types"):
        for block in [config[key]] if isinstance(config[key], str) else config[key] or ():
            for kind, content in UNSUPPORTED_BLOCKS.items():
                if re.match(rf"(UNetMidBlock2D)?{kind}[A-Z]", str(block)):
                    raise InputError(f"{origin} has {key} {block}, which holds {content}; use a model without it")
    if config.get("attention_type", "default") != "default":
        found = f"{origin} has attention_type {config['attention_type']!r}"
        raise InputError(f"{found}; supported: default (no grounding by boxes)")
    if "cross_attention_dim" not in config and config["time_embedding_type"] == "fourier":
        found = f"{origin} has time_embedding_type fourier, which takes the logarithm of the timestep"
        raise InputError(f"{found}, and DDPM's first timestep is 0; supported: positional, learned")


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_built(unet: Denoiser) -> None:
    """Check that all tensors have values; diffusers computes some buffers itself instead of reading them.

    Raises:
        ValueError: A buffer is neither in the weights file nor computed.
    """
    if empty := [name for name, tensor in unet.named_buffers() if tensor.is_meta]:
        raise ValueError(f"{empty[0]} is not part of a weights file, and such layers are not supported")


def check_heads(unet: Denoiser) -> None:
    """Check that each attention's width is a multiple of its number of heads, which the tensors do not show.

    Raises:
        ValueError: The number of heads of an attention is not a positive integer, or does not divide its width.
    """
    for name, module in unet.named_modules():
        heads = module.heads if isinstance(module, Attention) else 1
        if type(heads) is not int or heads < 1 or (heads > 1 and module.to_q.out_features % heads):
            raise ValueError(f"{name} cannot have {heads} heads")


def check_finite(network: nn.Module, origin: Path | str) -> None:
    """Check that all parameters and buffers are finite.

    Raises:
        InputError: A tensor holds an infinity or NaN; the first such tensor is named.
    """
    if broken := [name for name, tensor in network.state_dict().items() if not tensor.isfinite().all()]:
        raise InputError(f"{origin}: {broken[0]} holds values that are not finite; use another checkpoint")


def check_conditions(unet: Denoiser, conditions: Conditions | None, origin: Path) -> None:
    """Check that a conditional model has conditions of its width, and an unconditional model has none.

    Raises:
        InputError: The conditions are missing, superfluous or of another width.
    """
    width = unet.config["cross_attention_dim"] if isinstance(unet, UNet2DConditionModel) else None
    found = conditions.table.shape[-1] if conditions else None
    if width != found:
        needed = f"conditions of width {width}" if width else "no conditions"
        given = f"conditions of width {found}" if found else "none"
        raise InputError(f"the model takes {needed}, {origin} has {given}; fetch model and data together")


def check_images(images: NDArray[Any], shape: tuple[int, int, int], origin: Path) -> None:
    """Check that images or latents [N, C, H, W] have the shape [C, H, W] that the model generates.

    Raises:
        InputError: The shapes differ.
    """
    if images.shape[1:] != shape:
        found, expected = ("×".join(str(length) for length in lengths) for lengths in (images.shape[1:], shape))
        raise InputError(f"{origin} holds {found} images, the model generates {expected}; fetch both together")
