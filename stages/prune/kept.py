"""Groups and their cut channels -> the remaining channels of each layer; and the check of a plan against these."""

from collections import Counter
from collections.abc import Sequence

import torch

from stages.models.branches import check_removal, record_removal
from stages.models.families import Denoiser, family_name, skeleton
from stages.models.groups import Group, Member, find_groups
from stages.models.plan import KeptChannels, Plan, PlannedGroup, architecture_sha256
from stages.models.scores import KeptIndices
from stages.models.shortcuts import without_branches
from stages.runtime.errors import InputError


def cut_to_kept(groups: Sequence[Group], cuts: Sequence[torch.Tensor], unet: Denoiser) -> KeptIndices:
    """Find the remaining channels of the inputs and outputs of every layer."""
    kept: KeptIndices = {}
    for group, cut in zip(groups, cuts, strict=True):
        remove_channels(kept, group, cut, unet)
    return kept


def remove_channels(kept: KeptIndices, group: Group, cut: torch.Tensor, unet: Denoiser) -> None:
    """Remove the cut channels of one group from `kept`, in place."""
    for member in group.members:
        kept[member.layer, member.dim] = _without(kept, member, cut, unet)


def _without(kept: KeptIndices, member: Member, cut: torch.Tensor, unet: Denoiser) -> torch.Tensor:
    weight = unet.get_submodule(member.layer).weight
    assert isinstance(weight, torch.Tensor)
    return member.left(kept.get((member.layer, member.dim), torch.arange(weight.shape[member.dim])), cut)


def kept_to_layers(kept: KeptIndices) -> dict[str, KeptChannels]:
    """Convert `kept` to the form that the plan stores."""
    sides = {layer: [kept.get((layer, dim)) for dim in (0, 1)] for layer, _ in sorted(kept)}
    lists = {layer: [side if side is None else side.tolist() for side in pair] for layer, pair in sides.items()}
    return {layer: KeptChannels(outputs=outputs, inputs=inputs) for layer, (outputs, inputs) in lists.items()}


def check_plan(plan: Plan, unet: Denoiser) -> None:
    """Check that a plan fits a dense model: architecture, groups, layers and widths.

    Raises:
        InputError: The plan is for another architecture, or contradicts itself.
    """
    if plan.base.family != family_name(unet):
        found = f"the plan is for a {plan.base.family}, the model is a {family_name(unet)}"
        raise InputError(f"{found}; use a model of the plan's family")
    if plan.base.architecture_sha256 != architecture_sha256(unet):
        found = "the plan is for another architecture: its layers or shapes differ from the model's"
        raise InputError(f"{found}; use a checkpoint of the plan's architecture")
    groups = find_groups(_shallower(plan, unet))
    expected = [(group.root, group.width, group.blocks) for group in groups]
    if [(group.root, group.width, group.blocks) for group in plan.groups] != expected:
        raise InputError("the plan's groups differ from the model's; make a new plan with the prune stage")
    for group, planned in zip(groups, plan.groups, strict=True):
        if planned.cut != sorted(set(planned.cut)) or not set(planned.cut) < set(range(group.width)):
            raise InputError(
                f"the plan cuts unknown, repeated or all {group.width} channels of {group.root}; use the original plan"
            )
        _check_blocks(group, planned, plan)
    kept = cut_to_kept(groups, [torch.tensor(group.cut, dtype=torch.long) for group in plan.groups], unet)
    layers = kept_to_layers(kept)
    unknown = set(plan.heads) - {attention for group in groups for attention in group.attentions}
    if unknown:
        raise InputError(f"the plan has heads of {min(unknown)}, which no group cuts; use the original plan")
    wrong = [name for name in sorted({*layers, *plan.layers}) if layers.get(name) != plan.layers.get(name)]
    if wrong:
        raise InputError(f"the plan's channels of {wrong[0]} contradict its groups; use the original plan")


def _shallower(plan: Plan, unet: Denoiser) -> Denoiser:
    """Remove the branches that a plan removes, from a copy without weights.

    Raises:
        InputError: The model has no such branches, or they save something else.
    """
    bare, names = skeleton(unet), [branch.name for branch in plan.removed]
    try:
        check_removal(bare, names)
    except InputError as error:
        raise InputError(f"the plan removes branches that cannot go: {error.message}") from None
    if record_removal(bare, names) != plan.removed:
        raise InputError("the plan's removed branches have other kinds or sizes in the model; use the original plan")
    return without_branches(bare, names)


def _check_blocks(group: Group, planned: PlannedGroup, plan: Plan) -> None:
    """Check that the norm groups or heads that stay lose equally many channels, and that only heads are removed whole.

    Raises:
        InputError: Either is not the case, or the plan has another number of heads.
    """
    lost = Counter(channel // (group.width // group.blocks) for channel in planned.cut)
    left = [lost[block] for block in range(group.blocks) if lost[block] < group.width // group.blocks]
    expected = {len(left)} if group.attentions else {group.blocks}
    remaining = {plan.heads.get(attention, group.blocks) for attention in group.attentions} or {len(left)}
    if len(set(left)) > 1 or remaining != expected:
        raise InputError(
            f"the plan cuts {group.root} unevenly: its {group.blocks} norm groups or heads must stay of equal size"
        )
