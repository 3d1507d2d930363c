"""A UNet -> the groups of channels that can only be cut together, found by torch-pruning."""

import math
from dataclasses import dataclass

import torch
import torch_pruning
from diffusers.models.attention_processor import Attention
from torch import nn

from stages.models.families import FAMILIES, Denoiser, example_inputs, family_name, skeleton
from stages.models.pruned_unet import Layers
from stages.runtime.errors import InputError

ATTENTION_OUTPUTS = ("to_q", "to_k", "to_v")
Prunable = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Member:
    """One side of one layer that a group runs through."""

    layer: str
    dim: int
    """0 for the outputs of a weight (and for a norm), 1 for its inputs."""
    channels: torch.Tensor
    """Which of the layer's channels, in dense numbering."""
    roots: torch.Tensor
    """The group's channel that each of them stands for."""
    norm: bool = False
    """Whether the layer is a norm, which only scales what others produce."""


@dataclass(frozen=True)
class Group:
    """Channels that are coupled through additions, concatenations, products and norms.

    Where one layer feeds both factors of a product (the halves of GEGLU, scale and shift), a channel is a pair of them.
    """

    root: str
    """The layer that torch-pruning reaches the group from."""
    width: int
    """Number of channels of the dense model."""
    blocks: int
    """GroupNorm groups and attention heads that must stay of equal size; 1 where there are none."""
    members: list[Member]
    attentions: tuple[str, ...] = ()
    """The attentions with several heads whose queries, keys and values these are."""

    def producers(self) -> list[str]:
        """List the convolutions and linear layers whose outputs these channels are."""
        return [member.layer for member in self.members if member.dim == 0 and not member.norm]


def build_graph(unet: Denoiser) -> torch_pruning.DependencyGraph:
    """Trace which layers depend on which."""
    inputs = tuple(example_inputs(unet.eval()).values())
    with torch.enable_grad():
        return torch_pruning.DependencyGraph().build_dependency(unet, inputs)


def find_groups(unet: Denoiser) -> list[Group]:
    """List the groups of a dense UNet in the order of the original; the outputs of its last layer are protected.

    Raises:
        InputError: The model couples channels in a way that this cannot cut.
    """
    unet = skeleton(unet)
    graph, names = build_graph(unet), {module: name for name, module in unet.named_modules()}
    heads = {
        f"{name}.{side}": (name, module.heads)
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and module.heads > 1
        for side in ATTENTION_OUTPUTS
    }
    last = unet.get_submodule(FAMILIES[family_name(unet)].last)
    return [_group(graph, found, names, heads) for found in graph.get_all_groups(ignored_layers=[last])]


def _group(
    graph: torch_pruning.DependencyGraph,
    found: torch_pruning.Group,
    names: dict[nn.Module, str],
    heads: dict[str, tuple[str, int]],
) -> Group:
    members, blocks, attentions = [], {1}, set()
    for item in found:
        layer = item.dep.target.module
        if not isinstance(layer, Layers):
            continue
        inputs = isinstance(layer, Prunable) and graph.is_in_channel_pruning_fn(item.dep.handler)
        if isinstance(layer, nn.GroupNorm):
            blocks.add(layer.num_groups)
        elif not inputs and names[layer] in heads:
            attention, num_heads = heads[names[layer]]
            attentions.add(attention)
            blocks.add(num_heads)
        channels, roots = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
        members.append(Member(names[layer], int(inputs), channels, roots, not isinstance(layer, Prunable)))
    root, width = names[found[0].dep.target.module], len(found[0].idxs)
    if attentions and len(blocks) > 2:  # noqa: PLR2004  # 1 and the number of heads
        raise InputError(f"the heads of {root} are coupled with a norm; such a model cannot be pruned")
    if any(len(member.channels) < width for member in members):
        members, width = _fold(members, width, root)
    return Group(root, width, math.lcm(*blocks), members, tuple(sorted(attentions)))


def _fold(members: list[Member], width: int, root: str) -> tuple[list[Member], int]:
    """Number a group whose root is chunked by what can be cut alone: channel c of every chunk together.

    Raises:
        InputError: The members are not chunks of equal size.
    """
    chunk = min(len(member.channels) for member in members)
    merged: dict[tuple[str, int, bool], dict[int, int]] = {}
    for member in members:
        folded = member.roots % chunk
        if width % chunk or not torch.equal(folded, member.channels % chunk):
            raise InputError(f"{root} feeds {member.layer} in uneven parts; such a model cannot be pruned")
        side = merged.setdefault((member.layer, member.dim, member.norm), {})
        side.update(zip(member.channels.tolist(), folded.tolist(), strict=True))
    sides = [
        Member(layer, dim, torch.tensor(list(roots)), torch.tensor(list(roots.values())), norm)
        for (layer, dim, norm), roots in merged.items()
    ]
    return sides, chunk
