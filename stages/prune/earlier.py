"""A model that was pruned before, and its plan -> what a further cut needs to know of the dense model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from stages.models.complexity import count_macs, count_params
from stages.models.families import Denoiser, family_of
from stages.models.families.family import ATTENTION_OUTPUTS
from stages.models.groups import Group
from stages.models.layout import PLAN
from stages.models.params import Quantity
from stages.models.plan import Plan, read_plan
from stages.models.shortcuts import bypassed
from stages.prune.kept import check_plan
from stages.runtime.errors import InputError

META = torch.device("meta")


def read_earlier(model: Path, unet: Denoiser) -> Plan | None:
    """Read the plan of a model folder and check that it describes the model; None for a model without one.

    Raises:
        InputError: The plan is damaged or contradicts itself, or is not that of the model.
    """
    path = model / PLAN
    if not path.is_file():
        return None
    plan = read_plan(path)
    try:
        check_plan(plan, dense_model(unet, META))
        _check_result(plan, unet)
    except InputError as error:
        found = f"{path} is not the plan of the model beside it ({error.message.partition(';')[0]})"
        raise InputError(f"{found}; remove it to prune the model as a dense one") from None
    return plan


def _check_result(plan: Plan, unet: Denoiser) -> None:
    """Check that the layers have the widths that the plan keeps.

    Raises:
        InputError: A layer has another width, or other branches are removed.
    """
    if sorted(branch.name for branch in plan.removed) != sorted(bypassed(unet)):
        raise InputError(f"{len(bypassed(unet))} residual branches are removed, {len(plan.removed)} by the plan")
    for name, kept in plan.layers.items():
        shape = cast("torch.Tensor", unet.get_submodule(name).weight).shape
        sides = zip(shape, (kept.outputs, kept.inputs), strict=False)
        if any(channels is not None and len(channels) != width for width, channels in sides):
            raise InputError(f"{name} has the shape {tuple(shape)} and not the channels that the plan keeps")


def dense_model(unet: Denoiser, device: torch.device) -> Denoiser:
    """Build the dense model that a pruned one was cut from, with weights of its default initialisation."""
    with torch.random.fork_rng(devices=[]), device:
        torch.manual_seed(0)
        return family_of(unet).build_dense(unet).to(device).eval()  # type: ignore[arg-type,no-any-return]


def after_cuts(groups: Sequence[Group], earlier: Plan | None) -> list[Group]:
    """Note in each group how many channels earlier cuts removed, and the attentions that they left with one head.

    Such a head is one of several, which whole heads must not narrow, though the model now looks like one that never had
    more.
    """
    if earlier is None:
        return list(groups)
    lost = {group.root: len(group.cut) for group in earlier.groups}
    single = {f"{name}.{side}": name for name, left in earlier.heads.items() if left == 1 for side in ATTENTION_OUTPUTS}
    return [
        replace(
            group,
            lost=lost.get(group.root, 0),
            attentions=group.attentions or tuple(sorted({single[it] for it in group.producers() if it in single})),
        )
        for group in groups
    ]


def dense_cost(unet: Denoiser, groups: Sequence[Group], quantity: Quantity) -> float:
    """Count channels, MACs or parameters of the dense model of a pruned one; targets are shares of them."""
    if quantity == "channels":
        return sum(group.original_width for group in groups)
    return count_cost(dense_model(unet, META), quantity)


def count_cost(unet: Denoiser, quantity: Quantity) -> float:
    """Count a model's MACs or parameters."""
    return count_macs(unet) if quantity == "macs" else count_params(unet)
