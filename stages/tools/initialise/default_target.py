"""Groups of channels -> the ratio to cut by default: the paper's, or a larger one where that cuts almost nothing."""

from collections.abc import Sequence

import torch

from stages.models.groups import Group
from stages.prune.params import PruneParams, Target
from stages.prune.path import find_path
from stages.prune.whole_groups import first_cuts, smallest_ratio

RATIO = 0.3
"""Share of the channels that the paper removes."""


def choose_ratio(groups: Sequence[Group], round_to: int, least: float = RATIO) -> float:
    """Return `least`, or the smallest ratio above it at which half of the groups lose channels.

    Groups that no ratio cuts, such as those of one channel for each norm group, do not count.

    Args:
        groups: The groups of the dense model.
        round_to: Channel counts stay multiples of it.
        least: Share of the channels, above 0 and below 1.

    Raises:
        InputError: No group can be cut.
    """
    params = PruneParams(target=Target(ratio=least), round_to=round_to)
    path = find_path(groups, [torch.ones(group.width) for group in groups], params)
    ratios = sorted(smallest_ratio(path, groups, [index]) or 0.0 for index in first_cuts(path))
    return max(least, ratios[(len(ratios) - 1) // 2])
