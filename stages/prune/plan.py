"""Groups and importance -> a plan: which channels go and which stay."""

from typing import Literal

import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from stages.artifacts import Importance
from stages.errors import InputError
from stages.params import Frozen
from stages.prune.groups import Group, Member, find_groups

Kept = dict[tuple[str, int], torch.Tensor]
"""(layer, dim) -> the channels that stay, in dense numbering; a side that no group runs through is not listed."""


class PlannedGroup(Frozen):
    """What happens to one group."""

    root: str
    width: int
    blocks: int
    cut: list[int]
    """Channels that go, ascending, in dense numbering."""


class KeptChannels(Frozen):
    """What stays of one layer, in dense numbering; null where a side is left whole."""

    outputs: list[int] | None = None
    inputs: list[int] | None = None


class Plan(Frozen):
    """The record of one pruning, as pruning_plan.json holds it."""

    version: Literal[1] = 1
    criterion: str
    formula: str
    order: str
    ratio: float
    seed: int
    base_sha256: str
    """Of the dense model's weights, by `tensors_sha256`."""
    groups: list[PlannedGroup]
    """In the order in which they were visited."""
    layers: dict[str, KeptChannels]


def plan_pruning(
    unet: UNet2DModel,
    importance: Importance,
    *,
    ratio: float,
    order: Literal["interleaved", "upfront"] = "interleaved",
    seed: int = 0,
) -> Plan:
    """Choose the channels to cut from a dense UNet.

    Args:
        unet: The dense model; it is only looked at.
        importance: What `measure_importance` found for this model.
        ratio: Share of channels to cut from every group, in [0, 1). A group of n channels loses n − int(n·(1 − ratio)),
            rounded down to a multiple of its GroupNorm groups or heads.
        order: interleaved scores a group on what the groups before it have left, as the original does; upfront scores
            all groups on the dense model.
        seed: For the scores of the criterion random.

    Raises:
        InputError: A group would lose all of its channels.
    """
    draws = torch.Generator().manual_seed(seed)
    kept: Kept = {}
    groups = []
    for group in find_groups(unet):
        surviving = kept if order == "interleaved" else {}
        drawn = torch.rand(group.width, generator=draws)
        scores = score_group(group, importance, surviving) if importance.saliency else drawn
        cut = choose(scores, group, ratio)
        groups.append(PlannedGroup(root=group.root, width=group.width, blocks=group.blocks, cut=cut.tolist()))
        for member in group.members:
            kept[member.layer, member.dim] = _without(kept, member, cut, unet)
    return Plan(
        criterion=importance.criterion,
        formula=importance.formula,
        order=order,
        ratio=ratio,
        seed=seed,
        base_sha256=importance.model_sha256,
        groups=groups,
        layers=_layers(kept),
    )


def score_group(group: Group, importance: Importance, kept: Kept) -> torch.Tensor:
    """Score the channels of a group: over its layers, the sum of |Σ saliency| over the weights still there: [width]."""
    scores = torch.zeros(group.width)
    for member in group.members:
        saliency = importance.saliency.get(member.layer)
        doubled = len(member.channels) != group.width
        if saliency is None or (doubled and not importance.counts_doubled):
            continue
        scores.scatter_add_(0, member.roots, _score_member(saliency, member, kept))
    return scores


def _score_member(saliency: torch.Tensor, member: Member, kept: Kept) -> torch.Tensor:
    chosen = saliency.index_select(member.dim, member.channels)
    other = kept.get((member.layer, 1 - member.dim))
    if other is not None and saliency.ndim > 1:
        chosen = chosen.index_select(1 - member.dim, other)
    return chosen.transpose(0, member.dim).flatten(1).sum(1).abs() if saliency.ndim > 1 else chosen.abs()


def choose(scores: torch.Tensor, group: Group, ratio: float) -> torch.Tensor:
    """Choose the lowest scores of each block, as many in each: channel numbers, ascending.

    Raises:
        InputError: Nothing would be left.
    """
    num_cut = group.width - int(group.width * (1 - ratio))
    per_block, block_width = num_cut // group.blocks, group.width // group.blocks
    if per_block >= block_width:
        left = f"prune.ratio {ratio} leaves 0 of {group.width} channels in {group.root}"
        raise InputError(f"{left}; lower prune.ratio in params.yaml")
    lowest = scores.view(group.blocks, block_width).argsort(dim=1, stable=True)[:, :per_block]
    return (lowest + torch.arange(group.blocks)[:, None] * block_width).flatten().sort().values


def _without(kept: Kept, member: Member, cut: torch.Tensor, unet: UNet2DModel) -> torch.Tensor:
    weight = unet.get_submodule(member.layer).weight
    assert isinstance(weight, torch.Tensor)
    before = kept.get((member.layer, member.dim), torch.arange(weight.shape[member.dim]))
    return before[~torch.isin(before, member.channels[torch.isin(member.roots, cut)])]


def _layers(kept: Kept) -> dict[str, KeptChannels]:
    sides = {layer: [kept.get((layer, dim)) for dim in (0, 1)] for layer, _ in sorted(kept)}
    lists = {layer: [side if side is None else side.tolist() for side in pair] for layer, pair in sides.items()}
    return {layer: KeptChannels(outputs=outputs, inputs=inputs) for layer, (outputs, inputs) in lists.items()}
