"""Groups and their scores -> the path from the dense to the smallest model: single cuts in order."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from stages.models.groups import Group
from stages.prune.params import Heads, PruneParams
from stages.runtime.errors import InputError

Cuts = list[int]
"""Number of channels removed from each group, in the order of the groups."""


@dataclass(frozen=True)
class Step:
    """One cut of the path."""

    group: int
    """Index of the group."""
    cut: int
    """Number of channels removed from the group after this step."""
    key: float
    """Sort key: steps are taken in ascending order."""


def find_path(groups: Sequence[Group], scores: Sequence[torch.Tensor], params: PruneParams) -> list[Step]:
    """Order all cuts that `params` allows.

    uniform sorts by the share of the group's channels that is removed; global by the score of the channels that the
    step removes, over the mean score of the group. Each step removes `width_step` channels of its group.

    Raises:
        InputError: A pattern matches no layer, or no group may be cut.
    """
    steps = [
        step
        for index in sorted(choose_groups(groups, params.include, params.exclude))
        for step in _steps(index, groups[index], scores[index], params)
    ]
    return sorted(steps, key=lambda step: (step.key, step.group, step.cut))


class NoGroupError(InputError):
    """The patterns of prune leave nothing to cut."""


def choose_groups(groups: Sequence[Group], include: Sequence[str], exclude: Sequence[str]) -> set[int]:
    """Find the groups whose producing layers all match `include` and do not match `exclude`.

    Raises:
        InputError: A pattern matches no producing layer.
        NoGroupError: No group is left.
    """
    producers = [group.producers() for group in groups]
    for key, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(layer, pattern) for layers in producers for layer in layers):
                raise InputError(f"prune.{key} {pattern!r} matches no layer that can be cut; correct it in params.yaml")
    chosen = {
        index
        for index, layers in enumerate(producers)
        if all(any(fnmatchcase(layer, pattern) for pattern in include) for layer in layers)
        and not any(fnmatchcase(layer, pattern) for layer in layers for pattern in exclude)
    }
    if not chosen:
        raise NoGroupError("prune.include and prune.exclude leave no group to cut; widen them in params.yaml")
    return chosen


def allowed_widths(group: Group, step: int, floor: float) -> list[int]:
    """List the widths of a cut group, descending: multiples of `step`, at least `floor` times the original width."""
    least = max(step, math.ceil(group.original_width * floor - 1e-9))
    return [width for width in range((group.width - 1) // step * step, 0, -step) if width >= least]


def width_removed(width: int, ratio: float) -> int:
    """Count the channels that a ratio allows to remove from a group: n − int(n·(1 − ratio)), as in the paper."""
    return width - int(width * (1 - ratio))


def removes_heads(group: Group, heads: Heads) -> bool:
    """Whether a group loses whole heads."""
    return bool(group.attentions) and (group.whole or heads == "whole")


def width_step(group: Group, round_to: int, heads: Heads) -> int:
    """Find the number that the width of a cut group must be a multiple of, so that its blocks stay of equal size.

    In attention with several heads, the width of a head divides it if whole heads are removed; otherwise `round_to`
    applies to the width of a head, so that heads no wider than `round_to` are not cut.
    """
    if removes_heads(group, heads):
        return math.lcm(group.width // group.blocks, round_to)
    if group.attentions:
        return group.blocks * round_to
    return math.lcm(group.blocks, round_to)


def _steps(index: int, group: Group, scores: torch.Tensor, params: PruneParams) -> Iterator[Step]:
    """Yield the cuts of one group, with the share that is removed or the relative mean score of this step as key."""
    removed = torch.zeros(group.width, dtype=torch.bool)
    mean = scores.mean().clamp_min(torch.finfo(scores.dtype).tiny)
    step = width_step(group, params.round_to, params.heads)
    for width in allowed_widths(group, step, params.floor):
        cut = group.width - width
        now = removed.clone()
        now[choose_channels(scores, group, cut, params.heads)] = True
        share, score = (group.lost + cut) / group.original_width, float(scores[now & ~removed].mean() / mean)
        yield Step(index, cut, share if params.ranking == "uniform" else score)
        removed = now


def choose_channels(scores: torch.Tensor, group: Group, num_cut: int, heads: Heads) -> torch.Tensor:
    """Choose the channels with the lowest scores, equally many in each block, or the heads with the lowest sums.

    Returns:
        The channels to cut, ascending: [num_cut].
    """
    table, block_width = scores.view(group.blocks, -1), group.width // group.blocks
    if removes_heads(group, heads):
        blocks = table.sum(dim=1).argsort(stable=True)[: num_cut // block_width]
        lowest = torch.arange(block_width).expand(len(blocks), -1)
    else:
        blocks = torch.arange(group.blocks)
        lowest = table.argsort(dim=1, stable=True)[:, : num_cut // group.blocks]
    return (lowest + blocks[:, None] * block_width).flatten().sort().values


def cuts_after(path: Sequence[Step], num_groups: int) -> Cuts:
    """Count the channels that a path removes from each group."""
    cuts = [0] * num_groups
    for step in path:
        cuts[step.group] = max(cuts[step.group], step.cut)
    return cuts
