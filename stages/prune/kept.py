"""Groups and the channels cut from them -> what stays of each layer; and a check that a plan says just that."""

from collections import Counter
from collections.abc import Sequence

import torch

from stages.models.families import Denoiser, family_name
from stages.models.groups import Group, Member, find_groups
from stages.models.plan import KeptChannels, Plan, PlannedGroup, architecture_sha256
from stages.models.scores import KeptIndices
from stages.runtime.errors import InputError


def cut_to_kept(groups: Sequence[Group], cuts: Sequence[torch.Tensor], unet: Denoiser) -> KeptIndices:
    """Follow each group's cut channels to the sides of the layers that it runs through."""
    kept: KeptIndices = {}
    for group, cut in zip(groups, cuts, strict=True):
        remove(kept, group, cut, unet)
    return kept


def remove(kept: KeptIndices, group: Group, cut: torch.Tensor, unet: Denoiser) -> None:
    """Take the cut channels of one group out of `kept`."""
    for member in group.members:
        kept[member.layer, member.dim] = _without(kept, member, cut, unet)


def _without(kept: KeptIndices, member: Member, cut: torch.Tensor, unet: Denoiser) -> torch.Tensor:
    weight = unet.get_submodule(member.layer).weight
    assert isinstance(weight, torch.Tensor)
    before = kept.get((member.layer, member.dim), torch.arange(weight.shape[member.dim]))
    return before[~torch.isin(before, member.channels[torch.isin(member.roots, cut)])]


def kept_to_layers(kept: KeptIndices) -> dict[str, KeptChannels]:
    """Write `kept` as the plan holds it."""
    sides = {layer: [kept.get((layer, dim)) for dim in (0, 1)] for layer, _ in sorted(kept)}
    lists = {layer: [side if side is None else side.tolist() for side in pair] for layer, pair in sides.items()}
    return {layer: KeptChannels(outputs=outputs, inputs=inputs) for layer, (outputs, inputs) in lists.items()}


def check_plan(plan: Plan, unet: Denoiser) -> None:
    """Make sure that a plan can be carried out on a dense model: same architecture, groups, layers and widths.

    Raises:
        InputError: It was made for another architecture, or contradicts itself.
    """
    if plan.base.family != family_name(unet):
        found = f"the plan is for a {plan.base.family}, this is a {family_name(unet)}"
        raise InputError(f"{found}; replay it on the former")
    if plan.base.architecture_sha256 != architecture_sha256(unet):
        found = "the plan was made for another architecture: its layers or shapes are not this model's"
        raise InputError(f"{found}; replay it on a checkpoint of its own base")
    groups = find_groups(unet)
    expected = [(group.root, group.width, group.blocks) for group in groups]
    if [(group.root, group.width, group.blocks) for group in plan.groups] != expected:
        raise InputError("the plan's groups are not those of this model; make the plan anew with the prune stage")
    for group, planned in zip(groups, plan.groups, strict=True):
        if planned.cut != sorted(set(planned.cut)) or not set(planned.cut) < set(range(group.width)):
            raise InputError(f"the plan cuts channels of {group.root} that do not exist, twice, or all {group.width}")
        _check_blocks(group, planned, plan)
    kept = cut_to_kept(groups, [torch.tensor(group.cut, dtype=torch.long) for group in plan.groups], unet)
    layers = kept_to_layers(kept)
    unknown = set(plan.heads) - {attention for group in groups for attention in group.attentions}
    if unknown:
        raise InputError(f"the plan counts the heads of {min(unknown)}, which this model does not cut")
    wrong = [name for name in sorted({*layers, *plan.layers}) if layers.get(name) != plan.layers.get(name)]
    if wrong:
        raise InputError(f"the plan's channels of {wrong[0]} are not those that its groups leave")


def _check_blocks(group: Group, planned: PlannedGroup, plan: Plan) -> None:
    """Make sure that every GroupNorm group or head loses as much, or that whole heads go.

    Raises:
        InputError: Neither is so, or the plan counts other heads.
    """
    lost = Counter(channel // (group.width // group.blocks) for channel in planned.cut)
    even = len(lost) in (0, group.blocks) and len(set(lost.values())) <= 1
    whole = bool(lost) and set(lost.values()) == {group.width // group.blocks}
    left = {plan.heads.get(attention, group.blocks) for attention in group.attentions}
    if not (whole and left == {group.blocks - len(lost)}) and not (even and left <= {group.blocks}):
        raise InputError(f"the plan cuts {group.root} unevenly: its {group.blocks} norm groups or heads stay equal")
