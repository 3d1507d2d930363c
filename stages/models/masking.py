"""A dense model and the channels that are kept -> the dense model without the others, to compare a pruned one with.

The groups of a known class are known to be right; those of an own class are what torch-pruning makes of its trace,
in which a reshape, a split or a sum over channels may be misread. Masking needs no groups: weights that read or write a
cut channel are zero, and a norm takes its statistics from the kept channels. A pruned model whose channels are the kept
ones gives the same output.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812  # as in PyTorch's own documentation
from torch import nn

from stages.models.families import Denoiser, example_inputs, family_of, forward
from stages.models.groups import Group, build_graph, cut_outputs
from stages.runtime.errors import CODE_ERRORS, InputError, SignalExit, described
from stages.runtime.seeds import generator

TOLERANCE = 1e-3
"""Largest difference of two outputs, as a share of the largest value, that is rounding."""
BATCH = 2
Kept = Mapping[tuple[str, int], torch.Tensor]
"""(layer, dim) -> the kept channels; sides that lose none may be absent."""


@torch.no_grad()
def masked(unet: Denoiser, kept: Kept) -> Denoiser:
    """Copy a model and silence the channels that are not kept."""
    copied = copy.deepcopy(unet)
    for (name, dim), channels in kept.items():
        layer = copied.get_submodule(name)
        if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            layer.register_forward_hook(partial(_norm_of, channels.to(unet.device)))
            continue
        weight = layer.get_parameter("weight")
        mask = torch.zeros(weight.shape[dim], device=weight.device)
        mask[channels.to(weight.device)] = 1
        weight.mul_(mask.view(-1, *[1] * (weight.ndim - dim - 1)))
        bias = getattr(layer, "bias", None)
        if dim == 0 and bias is not None:
            bias.mul_(mask)
    return copied


def _norm_of(
    channels: torch.Tensor, norm: nn.GroupNorm | nn.LayerNorm, inputs: tuple[torch.Tensor], output: torch.Tensor
) -> torch.Tensor:
    """Normalise the kept channels alone; the others become zero."""
    dim = 1 if isinstance(norm, nn.GroupNorm) else inputs[0].ndim - 1
    values = inputs[0].index_select(dim, channels)
    weight, bias = (None if each is None else each[channels] for each in (norm.weight, norm.bias))
    if isinstance(norm, nn.GroupNorm):
        normed = F.group_norm(values, norm.num_groups, weight, bias, norm.eps)
    else:
        normed = F.layer_norm(values, (len(channels),), weight, bias, norm.eps)
    return torch.zeros_like(output).index_copy(dim, channels, normed)


@torch.no_grad()
def relative_error(dense: Denoiser, pruned: Denoiser, kept: Kept) -> float:
    """Compare a pruned model with the masked dense one: the largest difference over the largest value of an output.

    Raises:
        ValueError: The pruned model's output has another shape.
    """
    inputs = example_inputs(dense, BATCH)
    noise = torch.randn(inputs["sample"].shape, generator=generator(0, "masking")).to(dense.device)
    inputs |= {"sample": noise, "timestep": torch.arange(BATCH, device=dense.device)}
    expected, found = forward(masked(dense, kept), inputs), forward(pruned, inputs)
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny))


def check_masked(unet: Denoiser, groups: Sequence[Group]) -> None:
    """Cut half of each group, of a copy with random weights, and compare it with the masked copy.

    Weights of zero, as trained models have them at the end of a branch before training, would hide a difference.

    Raises:
        InputError: The model cannot be traced or run, or a cut of a group does more than to remove its channels.
    """
    dense = with_random_weights(unet)
    if _fault(dense, groups) is None:
        return
    for group in groups:
        if fault := _fault(dense, [group]):
            others = sorted({member.layer for member in group.members} - {group.root})
            also = f" (with {', '.join(others[:3])}{', …' if others[3:] else ''})" if others else ""
            found = f"channels of {group.root}{also} cannot be cut alone: {fault}"
            raise InputError(f"{found}; add {group.root} to protected, or describe its attention, in denoiser.json")
    raise InputError(f"the model cannot be cut: {_fault(dense, groups)}; add layers to protected in denoiser.json")


def _fault(dense: Denoiser, groups: Sequence[Group]) -> str | None:
    """Cut half of some groups; returns what is wrong with the result, None if nothing is."""
    pruned = copy.deepcopy(dense)
    graph, family = build_graph(pruned), family_of(pruned)
    kept: dict[tuple[str, int], torch.Tensor] = {}
    for group in groups:
        removed = _half(group)
        for member in group.members:
            side = (member.layer, member.dim)
            kept[side] = member.left(kept.get(side, torch.arange(_width(dense, *side))), removed)
        outputs = [it for it in range(_width(dense, group.root, 0)) if it not in set(kept[group.root, 0].tolist())]
        if outputs:
            cut_outputs(pruned, graph, group.root, outputs)
        if group.whole and len(removed):
            left = group.blocks - len(removed) * group.blocks // group.width
            family.set_heads(pruned, dict.fromkeys(group.attentions, left))
    family.note_widths(pruned)
    try:
        error = relative_error(dense, pruned, kept)
    except SignalExit:
        raise
    except CODE_ERRORS as raised:
        return f"the model then does not run ({described(raised)})"
    if error <= TOLERANCE:
        return None
    return f"the output then differs by {error:.2g} of its largest value from that without these channels"


def _width(unet: Denoiser, layer: str, dim: int) -> int:
    return int(unet.get_parameter(f"{layer}.weight").shape[dim])


def _half(group: Group) -> torch.Tensor:
    """Draw half of the channels of each block, or half of the heads; returns the removed channels, ascending."""
    draws, width = generator(0, f"half of {group.root}"), group.width // group.blocks
    channels = torch.arange(group.width).view(group.blocks, width)
    if group.whole:
        return channels[torch.randperm(group.blocks, generator=draws)[: group.blocks // 2]].flatten().sort().values
    chosen = [block[torch.randperm(width, generator=draws)[: width // 2]] for block in channels]
    return torch.cat(chosen).sort().values


@torch.no_grad()
def with_random_weights(unet: Denoiser) -> Denoiser:
    """Copy a model and draw all parameters anew, scaled so that values neither vanish nor explode."""
    copied = copy.deepcopy(unet)
    for name, parameter in copied.named_parameters():
        draws = torch.randn(parameter.shape, generator=generator(0, f"random {name}")).to(parameter.device)
        if parameter.ndim > 1:
            parameter.copy_(draws / max(parameter[0].numel(), 1) ** 0.5)
        else:
            is_scale = name.endswith("weight")
            parameter.copy_(draws * 0.1 + float(is_scale))
    return copied
