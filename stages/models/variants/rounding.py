"""Float weights <-> integers of 8 or 4 bits, or floats of 8, with one scale per output channel or group of weights.

Integers are symmetric and to the nearest: q = round(w / s) with s = max|w| / (2^(bits - 1) - 1), so that
|w - s q| ≤ s / 2. Floats of 8 bits are e4m3 with s = max|w| / 448: three bits behind the first, so that |w - s q| is at
most |w| / 16, or s / 1024 near zero.
"""

from collections.abc import Mapping

import torch

from stages.models.variants.kinds import FLOAT8, INTEGERS

GROUP = 64
"""Weights of one output channel that share a scale, at 4 bits; at 8 bits a whole channel does."""
SCALE = ".scales"
VALUES = {**dict.fromkeys(INTEGERS, ".integers"), FLOAT8: ".float8"}
"""Form -> what stands behind the name of a weight in the name of its rounded values; SCALE is that of their scales."""
E4M3 = torch.float8_e4m3fn
TYPES = {"int8": torch.int8, "int4": torch.uint8, FLOAT8: E4M3}
"""Form -> type of its rounded values."""


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


def to_float8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight [O, …] to floats of 8 bits, on the CPU; returns e4m3 of its shape, and scales, float32 [O, 1]."""
    rows, largest = weight.detach().cpu().float().flatten(1), torch.finfo(E4M3).max
    scales = rows.abs().amax(dim=1, keepdim=True) / largest
    steps = torch.where(scales > 0, scales, 1.0)
    return (rows / steps).clamp(-largest, largest).to(E4M3).reshape(weight.shape), scales


def dequantize(values: torch.Tensor, scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Multiply rounded values by their scales; returns the float32 weight of that shape.

    Raises:
        ValueError: Values or scales do not fit the shape, or scales are not float32; nothing was allocated.
    """
    is_packed, columns = values.dtype == torch.uint8, shape[1:].numel()
    group = GROUP if is_packed else columns
    if len(shape) < 2 or not shape.numel():  # noqa: PLR2004  # such tensors are not rounded
        raise ValueError(f"a tensor of shape {list(shape)} has no rounded values")
    for name, tensor, expected in (
        ("values", values, (shape[0], -(-columns // 2)) if is_packed else shape),
        ("scales", scales, (shape[0], -(-columns // group))),
    ):
        if tensor.shape != expected:
            raise ValueError(f"the {name} have the shape {list(tensor.shape)}, expected {list(expected)}")
    if scales.dtype != torch.float32:
        raise ValueError(f"the scales are {scales.dtype}, expected {torch.float32}")
    rows = _unpack(values, columns) if is_packed else values.flatten(1).float()
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
    """Replace each weight of a layer by its rounded values and scales; what has one dimension, or no floats, stays."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if _is_weight(tensor):
            rounded = to_float8(tensor) if form == FLOAT8 else quantize(tensor, INTEGERS[form])
            found[name + VALUES[form]], found[name + SCALE] = rounded
        else:
            found[name] = tensor
    return found


def dequantize_tensors(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], form: str
) -> dict[str, torch.Tensor]:
    """Undo `quantize_tensors`, up to the rounding.

    Args:
        tensors: Names and tensors as they were written.
        shapes: Name of a weight -> its shape, from the config of the model.
        form: The form that was written.

    Raises:
        ValueError: Values and scales do not fit each other or the shape of their weight.
    """
    end = VALUES[form]
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith((end, SCALE))}
    for name in (name.removesuffix(end) for name in tensors if name.endswith(end)):
        if name not in shapes or name + SCALE not in tensors:
            raise ValueError(f"{name} has {end[1:]} without a scale, or is no weight of the model")
        values = tensors[name + end]
        if values.dtype != TYPES[form]:
            raise ValueError(f"the {end[1:]} of {name} are {values.dtype}, expected {TYPES[form]}")
        try:
            found[name] = dequantize(values, tensors[name + SCALE], shapes[name])
        except ValueError as error:
            raise ValueError(f"the {end[1:]} and scales of {name} do not fit it: {error}") from None
    return found


def _is_weight(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel() > 0
