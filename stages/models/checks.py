"""Checks that a model is supported and intact, and that images and conditions fit it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from numpy.typing import NDArray
from torch import nn

from stages.data.images import Conditions
from stages.models.families import CLASSES, FAMILIES, Denoiser
from stages.runtime.errors import InputError


def check_supported(config: Mapping[str, Any], origin: Path) -> None:
    """Check that this version can sample from, train and prune a model with this config.

    Raises:
        InputError: The class is not supported, the model takes class labels or further conditions, its output does not
            have the input's shape, or its images are not square.
    """
    if str(config.get("_class_name")) not in CLASSES:
        found = f"{origin} describes a {config.get('_class_name')}"
        raise InputError(f"{found}; supported: {', '.join(FAMILIES)} (docs/models.md)")
    if config.get("num_class_embeds") or config.get("class_embed_type"):
        raise InputError(f"{origin} describes a model with class labels; supported: none, or cross-attention")
    if config.get("addition_embed_type") or config.get("encoder_hid_dim_type"):
        raise InputError(f"{origin} describes a model with further conditions; supported: encoder_hidden_states alone")
    if config.get("in_channels") != config.get("out_channels"):
        sides = f"{config.get('in_channels')} input and {config.get('out_channels')} output channels"
        raise InputError(f"{origin} describes a model with {sides}; supported: equal numbers (no learned variance)")
    if type(config.get("cross_attention_dim", 1)) is not int:
        raise InputError(f"{origin} has cross_attention_dim {config['cross_attention_dim']!r}; supported: one integer")
    if type(config.get("sample_size")) is not int or config["sample_size"] < 1:
        found = f"{origin} has sample_size {config.get('sample_size')!r}"
        raise InputError(f"{found}; supported: one positive integer, for square images")


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
