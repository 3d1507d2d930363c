"""The block prune, a dense model and a number of rounds -> the target of each round."""

from collections.abc import Sequence

import torch

from stages.models.families import Denoiser
from stages.models.groups import Group, find_groups
from stages.models.pipeline import unet_config
from stages.prune.budget import solve_budget
from stages.prune.params import PruneParams, Target
from stages.prune.path import find_path
from stages.prune.width_cost import WidthCost
from stages.runtime.errors import InputError


def find_targets(unet: Denoiser, prune: PruneParams, count: int) -> list[Target]:
    """Divide the way from the dense model to its target into rounds, and return the target of each.

    Raises:
        InputError: The model was pruned before it was fetched, the target is out of reach, or under uniform ranking a
            round would cut nothing; under global ranking the scores decide that.
    """
    if "pruned_widths" in unet_config(unet):  # of which the plan of the first round would know nothing
        found = f"rounds.count {count} needs a dense model, and fetch.model is one that was pruned before"
        raise InputError(f"{found}; set rounds.count to 1, or fetch the dense model")
    groups = find_groups(unet)
    costs = WidthCost(unet, groups, heads=prune.heads, latency_repeats=prune.latency_repeats)
    dense = getattr(costs, prune.target.quantity)([0] * len(groups))
    targets = [prune.target.on_the_way(index / count, dense) for index in range(1, count)]
    targets.append(prune.target)
    if prune.ranking == "uniform":
        _check_cuts(groups, costs, prune, targets)
    return targets


def _check_cuts(groups: Sequence[Group], costs: WidthCost, prune: PruneParams, targets: Sequence[Target]) -> None:
    """Check that each round cuts something; under uniform ranking widths decide that, and scores only which channels.

    Raises:
        InputError: A round cuts nothing, or the last target is out of reach.
    """
    path = find_path(groups, [torch.ones(group.width) for group in groups], prune)
    last, _ = solve_budget(prune, path, groups, costs)
    before = [0] * len(groups)
    for index, target in enumerate(targets[:-1], start=1):
        try:
            cuts, _ = solve_budget(prune.model_copy(update={"target": target}), path, groups, costs)
        except InputError:
            cuts = before
        if cuts in (before, last):
            ((name, amount),) = target.given().items()
            size = amount if isinstance(amount, str) else f"{amount:.4g}"
            found = f"rounds.count {len(targets)} is too high for these widths: round {index}, at {name} {size}, has no"
            raise InputError(f"{found} channels of its own to cut; lower it, or prune.round_to")
        before = cuts
