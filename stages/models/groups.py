"""A denoiser -> its groups of coupled channels, which can only be pruned together; found by torch-pruning."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch_pruning
from torch import nn

from stages.models.families import Denoiser, example_inputs, family_of, skeleton
from stages.models.families.family import FusedAttention
from stages.models.pruned_unet import Layers
from stages.models.structure import once_per_structure
from stages.runtime.errors import InputError

Prunable = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Member:
    """The inputs or outputs of one layer that belong to a group."""

    layer: str
    dim: int
    """Dimension of the layer's weight: 0 for outputs (and for a norm), 1 for inputs (and an embedding's columns)."""
    channels: torch.Tensor
    """Indices of the layer's channels in the dense model."""
    roots: torch.Tensor
    """The group's channel that each of `channels` belongs to."""
    norm: bool = False
    """Whether the layer is a norm, which only scales the outputs of other layers."""

    def left(self, kept: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
        """Return which of the layer's kept channels are left once channels of the group are cut."""
        return kept[~torch.isin(kept, self.channels[torch.isin(self.roots, cut)])]


@dataclass(frozen=True)
class Group:
    """Channels that are coupled through additions, concatenations, products and norms.

    If one layer feeds both factors of a product (the halves of GEGLU, scale and shift), one channel of the group stands
    for a pair of the layer's channels.
    """

    root: str
    """Name of the layer where torch-pruning starts the group."""
    width: int
    """Number of channels in the dense model."""
    blocks: int
    """Number of GroupNorm groups or attention heads that must keep equal sizes; 1 without either."""
    members: list[Member]
    attentions: tuple[str, ...] = ()
    """The multi-head attentions whose queries, keys or values these channels are."""
    whole: bool = False
    """Whether only whole heads can go, whatever prune.heads says."""
    lost: int = 0
    """Number of channels that earlier cuts removed; ratios and shares are of `original_width`."""

    @property
    def original_width(self) -> int:
        """Number of channels before all cuts."""
        return self.width + self.lost

    @property
    def gated(self) -> bool:
        """Whether its channels are pairs of outputs of one layer: value c and gate c of a GEGLU."""
        halves = any(member.layer == self.root and len(member.channels) == 2 * self.width for member in self.members)
        return halves and not any(member.norm for member in self.members)

    def producers(self) -> list[str]:
        """Names of the convolutions and linear layers whose outputs these channels are."""
        return [member.layer for member in self.members if member.dim == 0 and not member.norm]


def weighted_layers(unet: nn.Module) -> dict[str, nn.Conv2d | nn.Linear | nn.GroupNorm | nn.LayerNorm | nn.Embedding]:
    """List the layers whose weights have a channel for each output; norms without weights are left out."""
    return {name: it for name, it in unet.named_modules() if isinstance(it, Layers) and it.weight is not None}


def build_graph(unet: Denoiser) -> torch_pruning.DependencyGraph:
    """Trace the dependencies between the layers of a denoiser."""
    inputs = tuple(example_inputs(unet.eval()).values())
    with torch.enable_grad():
        return torch_pruning.DependencyGraph().build_dependency(unet, inputs, verbose=False)


@once_per_structure
def find_groups(unet: Denoiser) -> list[Group]:
    """List the groups of a dense model in the order of torch-pruning; layers that its family protects stay whole.

    Raises:
        InputError: The model couples channels in a way that is not supported.
    """
    unet = skeleton(unet)
    graph, names = build_graph(unet), {module: name for name, module in unet.named_modules()}
    family = family_of(unet)
    heads = {layer: found for layer, found in family.attention_outputs(unet).items() if found[1] > 1}
    found = list(graph.get_all_groups(ignored_layers=family.protected(unet)))
    if family.proven:
        for each in found:
            _check_layers(each, names)
    fused = family.fused_attentions(unet).items()
    return [
        *(_build_group(graph, each, names, heads) for each in found),
        *(_fused_group(layer, attention, len(unet.get_parameter(f"{layer}.weight"))) for layer, attention in fused),
    ]


def _check_layers(found: torch_pruning.Group, names: dict[nn.Module, str]) -> None:
    """Check that a group holds only layers that can be cut, and weights of no others.

    Raises:
        InputError: It does not.
    """
    root = names[found[0].dep.target.module]
    for item in found:
        layer = item.dep.target.module
        is_grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1
        if isinstance(layer, nn.Parameter):
            other = f"a parameter {tuple(layer.shape)} of no layer"
        elif isinstance(layer, Layers) and layer.weight is None:
            other = f"{names[layer]}, a {type(layer).__name__} without weights"
        elif is_grouped or (not isinstance(layer, Layers) and any(True for _ in layer.parameters())):
            other = f"{names[layer]}, a {type(layer).__name__}{' with groups' if is_grouped else ''}"
        else:
            continue
        kinds = ", ".join(each.__name__ for each in Layers)
        raise InputError(f"the channels of {root} are also those of {other}; cut are {kinds}: add {root} to protected")


def _fused_group(layer: str, attention: FusedAttention, num_outputs: int) -> Group:
    """Build the group of an attention whose queries, keys and values one layer gives: a channel is one of each."""
    rows, width = attention.rows(num_outputs), num_outputs // 3
    channels = torch.arange(width)
    members = [Member(layer, 0, rows.flatten(), channels.repeat(3)), Member(attention.out, 1, channels, channels)]
    return Group(layer, width, attention.heads, members, (attention.name,), whole=True)


def cut_outputs(unet: Denoiser, graph: torch_pruning.DependencyGraph, root: str, outputs: Sequence[int]) -> None:
    """Cut outputs of a layer and what is coupled with them, in place: by torch-pruning, or heads of a fused layer."""
    layer = unet.get_submodule(root)
    if attention := family_of(unet).fused_attentions(unet).get(root):
        kept = ~torch.isin(torch.arange(len(layer.weight)), torch.tensor(outputs))  # type: ignore[arg-type]
        inputs = kept[attention.rows(len(kept))[0]]
        _keep(layer, 0, kept)
        _keep(unet.get_submodule(attention.out), 1, inputs)
    else:
        graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, list(outputs)).prune()


def _keep(layer: nn.Module, dim: int, kept: torch.Tensor) -> None:
    """Keep some outputs or inputs of a layer, in place."""
    chosen = kept.nonzero().flatten()
    for kind in ("weight", "bias") if dim == 0 else ("weight",):
        old = getattr(layer, kind)
        if old is not None:
            new = old.detach().index_select(dim, chosen.to(old.device))
            setattr(layer, kind, nn.Parameter(new, requires_grad=old.requires_grad))


def _build_group(
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
        is_embedding = isinstance(layer, nn.Embedding)
        is_input = is_embedding or (isinstance(layer, Prunable) and graph.is_in_channel_pruning_fn(item.dep.handler))
        if isinstance(layer, nn.GroupNorm):
            blocks.add(layer.num_groups)
        elif not is_input and names[layer] in heads:
            attention, num_heads = heads[names[layer]]
            attentions.add(attention)
            blocks.add(num_heads)
        channels, roots = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
        is_norm = not isinstance(layer, (*Prunable, nn.Embedding))
        members.append(Member(names[layer], int(is_input), channels, roots, is_norm))
    root, width = names[found[0].dep.target.module], len(found[0].idxs)
    if attentions and len(blocks) > 2:  # noqa: PLR2004  # 1 and the number of heads
        raise InputError(f"the heads of {root} are coupled with a norm; such a model cannot be pruned")
    if any(len(member.channels) < width for member in members):
        members, width = _fold(members, width, root)
    return Group(root, width, math.lcm(*blocks), members, tuple(sorted(attentions)))


def _fold(members: list[Member], width: int, root: str) -> tuple[list[Member], int]:
    """Renumber a group whose root is split into chunks: channel c of every chunk becomes channel c of the group.

    Raises:
        InputError: A member is not split into chunks of equal size.
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
