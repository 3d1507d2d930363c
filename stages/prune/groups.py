"""A UNet -> the groups of channels that can only be cut together, found by torch-pruning."""

from dataclasses import dataclass

import torch
import torch_pruning
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import nn

from stages.diffusion.cost import example_inputs
from stages.errors import InputError

ATTENTION_OUTPUTS = ("to_q", "to_k", "to_v")


@dataclass(frozen=True)
class Member:
    """One side of one layer that a group runs through."""

    layer: str
    dim: int
    """0 for the outputs of a weight (and for GroupNorm), 1 for its inputs."""
    channels: torch.Tensor
    """Which of the layer's channels, in dense numbering."""
    roots: torch.Tensor
    """The group's channel that each of them stands for."""


@dataclass(frozen=True)
class Group:
    """Channels that are coupled through additions, concatenations and norms."""

    root: str
    """The layer that torch-pruning reaches the group from."""
    width: int
    """Number of channels of the dense model."""
    blocks: int
    """GroupNorm groups or attention heads that must stay of equal size; 1 where there are none."""
    members: list[Member]


def build_graph(unet: UNet2DModel) -> torch_pruning.DependencyGraph:
    """Trace which layers depend on which."""
    with torch.enable_grad():
        return torch_pruning.DependencyGraph().build_dependency(unet.eval(), example_inputs(unet))


def find_groups(unet: UNet2DModel) -> list[Group]:
    """List the groups of a dense UNet in the order of the original; the outputs of conv_out are protected.

    Raises:
        InputError: The model has layers whose halves are tied, which this cannot cut.
    """
    graph, names = build_graph(unet), {module: name for name, module in unet.named_modules()}
    heads = {
        f"{name}.{side}": module.heads
        for name, module in unet.named_modules()
        if isinstance(module, Attention)
        for side in ATTENTION_OUTPUTS
    }
    return [_group(graph, found, names, heads) for found in graph.get_all_groups(ignored_layers=[unet.conv_out])]


def _group(
    graph: torch_pruning.DependencyGraph,
    found: torch_pruning.Group,
    names: dict[nn.Module, str],
    heads: dict[str, int],
) -> Group:
    members, blocks = [], 1
    for item in found:
        layer = item.dep.target.module
        if isinstance(layer, nn.GroupNorm):
            blocks = max(blocks, layer.num_groups)
        elif not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        inputs = not isinstance(layer, nn.GroupNorm) and graph.is_in_channel_pruning_fn(item.dep.handler)
        if not inputs:
            blocks = max(blocks, heads.get(names[layer], 1))
        channels, roots = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
        members.append(Member(names[layer], int(inputs), channels, roots))
    root, width = names[found[0].dep.target.module], len(found[0].idxs)
    for member in members:
        if len(member.channels) < width:
            raise InputError(f"{root} feeds {member.layer} in halves (scale and shift); such a model cannot be pruned")
    return Group(root, width, blocks, members)
