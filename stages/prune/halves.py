"""Scores of the values and gates of a GEGLU, ranked apart -> the pairs that are cut."""

import math
from collections.abc import Sequence

import torch

from stages.models.groups import Group
from stages.models.plan import Plan
from stages.prune.params import PruneParams
from stages.prune.path import choose_groups, width_removed
from stages.runtime.errors import InputError


def find_gated(groups: Sequence[Group], params: PruneParams, earlier: Plan | None = None) -> set[int]:
    """Find the groups whose values and gates are ranked apart: none unless `params.geglu` is halves.

    Raises:
        InputError: The model has no GEGLU that may be cut, or was pruned before.
    """
    if params.geglu == "pairs":
        return set()
    if earlier:
        reason = "so that the ratio of its pairs is not defined"
        raise InputError(f"prune.geglu is halves, and the model was pruned before, {reason}; set it to pairs")
    chosen = choose_groups(groups, params.include, params.exclude)
    found = {index for index in chosen if groups[index].gated}
    if not found:
        raise InputError("prune.geglu is halves, and the model has no GEGLU that may be cut; set it to pairs")
    return found


def choose_pairs(scores: torch.Tensor, group: Group, params: PruneParams) -> torch.Tensor:
    """Choose the lowest n − int(n·(1 − ratio)) of n = 2·width values and gates, and the pairs that hold one of them.

    As in the original's LDM code: the values and gates are ranked apart, but a pair can only be cut whole.

    Args:
        scores: [2·width], the values first.
        group: A gated group.
        params: The block prune; its target is a ratio.

    Returns:
        The pairs to cut, ascending.

    Raises:
        InputError: Fewer pairs than the floor, or none, would be left.
    """
    assert params.target.ratio is not None
    removed = width_removed(len(scores), params.target.ratio)
    lowest = scores.argsort(stable=True)[: removed - removed % params.round_to]
    cut: torch.Tensor = (lowest % group.width).unique()
    left, least = group.width - len(cut), max(1, math.ceil(group.width * params.floor - 1e-9))
    if left < least:
        found = f"prune.target.ratio {params.target.ratio} with geglu halves leaves {left} of {group.width} pairs"
        raise InputError(f"{found} in {group.root}, at least {least} must stay; lower the ratio")
    return cut
