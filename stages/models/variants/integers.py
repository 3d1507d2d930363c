"""Float weights <-> integers of 8 or 4 bits with one scale per output channel or group of weights.

Symmetric and to the nearest: q = round(w / s) with s = max|w| / (2^(bits - 1) - 1), so that |w - s q| ≤ s / 2.
"""

from collections.abc import Mapping

import torch

from stages.models.variants.kinds import INTEGERS

GROUP = 64
"""Weights of one output channel that share a scale, at 4 bits; at 8 bits a whole channel does."""
INTEGER, SCALE = ".integers", ".scales"
"""What stands behind the name of a weight in the names of its two tensors."""


def quantize(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight [O, …] to integers.

    Returns:
        Integers, int8 of the weight's shape at 8 bits, and at 4 bits uint8 [O, ⌈K / 2⌉] with two in each byte, where K
        is the number of weights of an output channel; scales, float32 [O, groups].
    """
    rows = weight.detach().float().flatten(1)
    largest, group = 2 ** (bits - 1) - 1, GROUP if bits == 4 else rows.shape[1]  # noqa: PLR2004
    groups = torch.nn.functional.pad(rows, (0, -rows.shape[1] % group)).unflatten(1, (-1, group))
    scales = groups.abs().amax(dim=2) / largest
    steps = torch.where(scales > 0, scales, 1.0)[..., None]
    integers = (groups / steps).round().clamp(-largest, largest).to(torch.int8).flatten(1)[:, : rows.shape[1]]
    return integers.reshape(weight.shape) if bits == 8 else _pack(integers), scales  # noqa: PLR2004


def dequantize(integers: torch.Tensor, scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Multiply integers by their scales; returns the float32 weight of that shape."""
    columns = shape[1:].numel()
    rows = _unpack(integers, columns) if integers.dtype == torch.uint8 else integers.flatten(1)
    group = GROUP if integers.dtype == torch.uint8 else columns
    return (rows * scales.repeat_interleave(group, dim=1)[:, :columns]).reshape(shape)


def _pack(integers: torch.Tensor) -> torch.Tensor:
    """Put two integers of 4 bits into each byte, the first of them below: [O, K] int8 -> [O, ⌈K / 2⌉] uint8."""
    padded = torch.nn.functional.pad(integers, (0, integers.shape[1] % 2)).view(torch.uint8) & 15
    return padded[:, ::2] | (padded[:, 1::2] << 4)


def _unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    """Undo `_pack`: [O, ⌈K / 2⌉] uint8 -> [O, K] int8."""
    pairs = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1).view(torch.int8)
    return torch.where(pairs > 7, pairs - 16, pairs)[:, :columns]  # noqa: PLR2004


def quantize_tensors(tensors: Mapping[str, torch.Tensor], form: str) -> dict[str, torch.Tensor]:
    """Replace each weight of a layer, by its integers and scales; what has one dimension, or no floats, stays."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if _is_weight(tensor):
            found[name + INTEGER], found[name + SCALE] = quantize(tensor, INTEGERS[form])
        else:
            found[name] = tensor
    return found


def dequantize_tensors(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]
) -> dict[str, torch.Tensor]:
    """Undo `quantize_tensors`, up to the rounding.

    Args:
        tensors: Names and tensors as they were written.
        shapes: Name of a weight -> its shape, from the config of the model.

    Raises:
        ValueError: Integers and scales do not fit each other or the shape of their weight.
    """
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith((INTEGER, SCALE))}
    for name in (name.removesuffix(INTEGER) for name in tensors if name.endswith(INTEGER)):
        if name not in shapes or name + SCALE not in tensors:
            raise ValueError(f"{name} has integers without a scale, or is no weight of the model")
        try:
            found[name] = dequantize(tensors[name + INTEGER], tensors[name + SCALE], shapes[name])
        except RuntimeError:
            raise ValueError(f"the integers and scales of {name} do not fit its shape") from None
    return found


def _is_weight(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel() > 0
