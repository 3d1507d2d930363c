"""The tensors of a LoRA for the dense model, and a plan -> those for the pruned model."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from stages.models.families import Denoiser, family_name
from stages.models.plan import KeptChannels, Plan
from stages.models.shortcuts import without_branches
from stages.runtime.errors import InputError
from stages.tools.lora.names import LayerNames, Part, Role, parse_name

ADAPTED = nn.Linear, nn.Conv2d, nn.Embedding
FACTORS: list[tuple[Role, Role]] = [("down", "up"), ("embedding down", "embedding up")]
"""A and B of a LoRA."""


class Tensor(NamedTuple):
    """A tensor of an adapter and its place in the model."""

    name: str
    """In the file."""
    layer: str
    role: Role
    value: torch.Tensor


class SlicedAdapter(NamedTuple):
    """A LoRA for the pruned model."""

    tensors: dict[str, torch.Tensor]
    narrowed: list[str]
    """Layers that lost inputs or outputs."""
    whole: list[str]
    """Layers whose LoRA is as it was."""
    dropped: list[str]
    """Layers that the plan removes, and with them their LoRA."""
    num_others: int
    """Tensors of text encoders, which stay as they are."""


def slice_adapter(
    tensors: Mapping[str, torch.Tensor], dense: Denoiser, plan: Plan, origin: str = "the adapter"
) -> SlicedAdapter:
    """Slice a LoRA by the kept channels of a plan: A [r, in, …] by inputs, B [out, r, …] by outputs.

    (W + s·B·A)[K_out][:, K_in] = W[K_out][:, K_in] + s·B[K_out]·A[:, K_in], since each element of B·A is the product of
    one row of B and one column of A. Rank, alpha and so the factor s stay.

    Args:
        tensors: Those of the adapter: name -> tensor of any floating type.
        dense: The dense model, on any device; only its shapes are read.
        plan: A plan that fits it.
        origin: How to call the adapter in messages.

    Raises:
        InputError: A tensor is not one of a LoRA of this dense model; the first, in the order of names, is named.
    """
    found = _place(tensors, dense, origin)
    layers = {tensor.layer for tensor in found}
    left = dict(without_branches(dense, [branch.name for branch in plan.removed]).named_modules())
    dropped = sorted(layers - left.keys())
    kept = [tensor for tensor in found if tensor.layer in left]
    if not kept:
        raise InputError(f"{origin}: the plan removes every layer that it adapts; nothing would be left")
    sliced = {tensor.name: _slice(tensor, plan.layers.get(tensor.layer)) for tensor in kept}
    narrowed = {it.layer for it in kept if sliced[it.name].shape != it.value.shape}
    others = {name: tensor for name, tensor in tensors.items() if parse_name(name, origin) is None}
    return SlicedAdapter(
        {**sliced, **others}, sorted(narrowed), sorted(layers - narrowed - {*dropped}), dropped, len(others)
    )


def _place(tensors: Mapping[str, torch.Tensor], dense: Denoiser, origin: str) -> list[Tensor]:
    """Find the layer of each tensor, and check its shape and that no factor is missing.

    Raises:
        InputError: Something does not fit.
    """
    weights = {name: it.weight for name, it in dense.named_modules() if isinstance(it, ADAPTED)}
    names = LayerNames(weights)
    placed: dict[tuple[str, Role], Tensor] = {}
    for name in sorted(tensors):
        part = parse_name(name, origin)
        if part is None:
            continue
        layer = _find(names, part, name, dense, origin)
        tensor = Tensor(name, layer, part.role, tensors[name])
        _check_shape(tensor, weights[layer], origin)
        if (layer, part.role) in placed:
            raise InputError(f"{origin}: {name} repeats {placed[layer, part.role].name}; keep one of them")
        placed[layer, part.role] = tensor
    if not placed:
        raise InputError(f"{origin} has no LoRA of the {family_name(dense)}; give one that adapts it")
    _check_factors(placed, origin)
    return list(placed.values())


def _find(names: LayerNames, part: Part, name: str, dense: Denoiser, origin: str) -> str:
    layer = names.find(part)
    if layer is None:
        found = f"{origin} is for another base: {name} adapts the layer {part.layer}"
        raise InputError(f"{found}, which the plan's dense {family_name(dense)} lacks; give an adapter of that model")
    return layer


def _check_shape(tensor: Tensor, weight: torch.Tensor, origin: str) -> None:
    """Compare the shape of a tensor with the dense layer's; None stands for the rank.

    Raises:
        InputError: It differs, or the tensor does not hold finite floating numbers.
    """
    outputs, inputs, *kernel = weight.shape
    expected: dict[Role, list[int | None]] = {
        "down": [None, inputs, *kernel],
        "up": [outputs, None, *(1 for _ in kernel)],
        "bias": [outputs],
        "embedding down": [None, outputs],
        "embedding up": [inputs, None],
        "alpha": [1] * tensor.value.ndim,
    }
    shape, allowed = list(tensor.value.shape), expected[tensor.role]
    fits = len(shape) == len(allowed) and all(want in (None, size) for size, want in zip(shape, allowed, strict=True))
    if not fits:
        wanted = ", ".join("r" if size is None else str(size) for size in allowed)
        found = f"{origin} is for another base: {tensor.name} has the shape {shape}"
        raise InputError(f"{found}, the dense layer takes [{wanted}]; give an adapter of the plan's dense model")
    if not tensor.value.is_floating_point() and tensor.role != "alpha":
        raise InputError(f"{origin}: {tensor.name} holds {tensor.value.dtype}; allowed: floating numbers")
    if not tensor.value.isfinite().all():
        raise InputError(f"{origin}: {tensor.name} holds NaN or infinite numbers; give an adapter whose training held")


def _check_factors(placed: Mapping[tuple[str, Role], Tensor], origin: str) -> None:
    """Check that each layer has one A and one B of equal rank.

    Raises:
        InputError: A factor is missing, or the ranks differ.
    """
    for layer in sorted({layer for layer, _ in placed}):
        pairs = [[placed.get((layer, role)) for role in roles] for roles in FACTORS]
        present = [pair for pair in pairs if any(pair)]
        if len(present) != 1 or not all(present[0]):
            raise InputError(f"{origin} has not one A and one B for the layer {layer}; complete it")
        down, up = (tensor for tensor in present[0] if tensor)
        if down.value.shape[0] != up.value.shape[1] or not down.value.shape[0]:
            ranks = f"{down.name} has the rank {down.value.shape[0]}, {up.name} {up.value.shape[1]}"
            raise InputError(f"{origin}: {ranks}; both must have one rank, 1 or more")


def _slice(tensor: Tensor, kept: KeptChannels | None) -> torch.Tensor:
    """Index a tensor by the kept channels of its layer; the rows of an embedding are the plan's outputs."""
    if kept is None or tensor.role == "alpha":
        return tensor.value
    dims: dict[Role, tuple[int, list[int] | None]] = {
        "down": (1, kept.inputs),
        "up": (0, kept.outputs),
        "bias": (0, kept.outputs),
        "embedding down": (1, kept.outputs),
        "embedding up": (0, kept.inputs),
    }
    dim, channels = dims[tensor.role]
    if channels is None:
        return tensor.value
    return tensor.value.index_select(dim, torch.tensor(channels, dtype=torch.long, device=tensor.value.device))
