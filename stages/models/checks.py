"""Checks that a model is supported and intact, and that images and conditions fit it."""

import math
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import nn

from stages.data.images import Conditions, Images, read_images
from stages.models.families import CLASSES, KNOWN, Denoiser, config_defaults, family_of, find_family, sample_shape
from stages.models.layout import CODE, DESCRIPTION
from stages.models.trust import WAY
from stages.runtime.errors import InputError

MAX_BLOCKS, MAX_LAYERS, MAX_WIDTH = 64, 256, 1_000_000
"""Largest length of a list in a config, of a number of layers, and of any other number."""


def check_supported(config: Mapping[str, Any], origin: Path) -> None:
    """Check that this version can sample from, train and prune a model with this config.

    Raises:
        InputError: The class is not supported, the model takes further conditions, has blocks that cannot be cut,
            its output has other channels than its input, or the size of its samples is not known.
    """
    family = find_family(config)
    if family is None:
        known = ", ".join(each.name for each in KNOWN)
        found = f"{origin} describes a {config.get('_class_name')}; supported: {known} (docs/models.md)"
        raise InputError(f"{found}, or with {CODE} and {DESCRIPTION} beside the weights any class ({WAY})")
    defaults = config_defaults(CLASSES[config["_class_name"]])
    config = {**defaults, **config}
    check_sizes(config, defaults, origin)
    family.check_config(config, origin)


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


def check_layers(config: Mapping[str, Any], keys: Collection[str], num_tensors: int, origin: str) -> None:
    """Compare the number of layers with that of the tensors, before they are built.

    Args:
        config: The config.
        keys: Its keys whose product is a number of layers.
        num_tensors: Number of tensors in the weights.
        origin: How to call the model in messages.

    Raises:
        InputError: The weights cannot hold that many layers.
    """
    counts = [_largest(config.get(key)) for key in keys]
    if math.prod(counts) > num_tensors:
        found = f"the config describes {math.prod(counts)} layers or more, the weights {num_tensors} tensors"
        raise InputError(f"{origin}: {found}; use the weights of this config")


def _largest(value: object) -> int:
    """Return the largest number in nested lists, at least 1."""
    if isinstance(value, list | tuple):
        return max((_largest(item) for item in value), default=1)
    return max(value, 1) if isinstance(value, int) else 1


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
    for layer, (name, heads) in family_of(unet).attention_outputs(unet).items():
        if type(heads) is not int or heads < 1 or (heads > 1 and len(unet.get_parameter(f"{layer}.weight")) % heads):
            raise ValueError(f"{name} cannot have {heads} heads")


def check_finite(network: nn.Module, origin: Path | str) -> None:
    """Check that all parameters and buffers are finite.

    Raises:
        InputError: A tensor holds an infinity or NaN; the first such tensor is named.
    """
    if broken := [name for name, tensor in network.state_dict().items() if not tensor.isfinite().all()]:
        raise InputError(f"{origin}: {broken[0]} holds values that are not finite; use another checkpoint")


def read_fitting_images(data: Path, unet: Denoiser) -> Images:
    """Read packed images, and check that those for training and their conditions fit the model.

    Raises:
        InputError: The folder is damaged, or does not fit.
    """
    images = read_images(data)
    check_conditions(unet, images.conditions, data)
    check_images(images.train, sample_shape(unet), data)
    return images


def check_conditions(unet: Denoiser, conditions: Conditions | None, origin: Path) -> None:
    """Check that a conditional model has conditions of its width or labels of its classes, and any other has none.

    Raises:
        InputError: The conditions are missing, superfluous, of another width or of other classes.
    """
    family, table = family_of(unet), conditions.table if conditions else None
    width, labels = family.condition_width(unet), family.num_labels(unet)
    needed = f"conditions of width {width}" if width else f"labels below {labels}" if labels else "no conditions"
    if table is None:
        is_fit, given = not (width or labels), "none"
    elif table.ndim == 1:
        is_fit, given = bool(labels and table.max() < labels), f"labels up to {table.max()}"
    else:
        is_fit, given = table.shape[-1] == width, f"conditions of width {table.shape[-1]}"
    if not is_fit:
        raise InputError(f"the model takes {needed}, {origin} has {given}; fetch model and data together")


def check_images(images: NDArray[Any], shape: tuple[int, int, int], origin: Path) -> None:
    """Check that images or latents [N, C, H, W] have the shape [C, H, W] that the model generates.

    Raises:
        InputError: The shapes differ.
    """
    if images.shape[1:] != shape:
        found, expected = ("×".join(str(length) for length in lengths) for lengths in (images.shape[1:], shape))
        raise InputError(f"{origin} holds {found} images, the model generates {expected}; fetch both together")
