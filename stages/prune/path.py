"""Groups and their scores -> the path from the dense model to the smallest: single cuts in the order they are made."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from stages.models.groups import Group
from stages.prune.params import PruneParams
from stages.runtime.errors import InputError

Cuts = list[int]
"""How many channels each group loses, in the order of the groups."""


@dataclass(frozen=True)
class Step:
    """One cut of the path."""

    group: int
    cut: int
    """How many channels the group has lost after this step."""
    key: float
    """Where on the path it stands; ascending."""


def find_path(groups: Sequence[Group], scores: Sequence[torch.Tensor], params: PruneParams) -> list[Step]:
    """Order every cut that `params` allow.

    uniform takes next what has lost the smallest share of its channels, global what scores lowest, measured by the
    mean score of its group. Between two steps of one group lie as many channels as its quantum says.

    Raises:
        InputError: A pattern matches no layer, or nothing may be cut.
    """
    allowed = choose_groups(groups, params)
    steps = [
        step
        for index, group in enumerate(groups)
        if index in allowed
        for step in _steps(index, group, scores[index], params)
    ]
    return sorted(steps, key=lambda step: (step.key, step.group, step.cut))


def choose_groups(groups: Sequence[Group], params: PruneParams) -> set[int]:
    """Find the groups all of whose producing layers are included and none excluded.

    Raises:
        InputError: A pattern matches no layer, or no group is left.
    """
    producers = [group.producers() for group in groups]
    for key in ("include", "exclude"):
        for pattern in getattr(params, key):
            if not any(fnmatchcase(layer, pattern) for layers in producers for layer in layers):
                raise InputError(f"prune.{key} {pattern!r} matches no layer that can be cut; correct it in params.yaml")
    chosen = {
        index
        for index, layers in enumerate(producers)
        if all(any(fnmatchcase(layer, pattern) for pattern in params.include) for layer in layers)
        and not any(fnmatchcase(layer, pattern) for layer in layers for pattern in params.exclude)
    }
    if not chosen:
        raise InputError("prune.include and prune.exclude leave no group to cut; widen them in params.yaml")
    return chosen


def widths(group: Group, params: PruneParams) -> list[int]:
    """List the widths below the dense one that a group may have, descending."""
    step = quantum(group, params)
    least = max(step, math.ceil(group.width * params.floor - 1e-9))
    return [width for width in range((group.width - 1) // step * step, 0, -step) if width >= least]


def quantum(group: Group, params: PruneParams) -> int:
    """Find what a group's width must be a multiple of: blocks of equal size and `round_to`.

    The width of a head is rounded where an attention has several, so heads no wider than `round_to` stay as they are;
    whole heads go where `heads` says so.
    """
    if group.attentions and params.heads == "whole":
        return group.width // group.blocks
    if group.attentions:
        return group.blocks * params.round_to
    return math.lcm(group.blocks, params.round_to)


def _steps(index: int, group: Group, scores: torch.Tensor, params: PruneParams) -> Iterator[Step]:
    """Give one group's cuts, keyed by the share that is lost or by the mean score of what goes in this step."""
    gone = torch.zeros(group.width, dtype=torch.bool)
    mean = scores.mean().clamp_min(torch.finfo(scores.dtype).tiny)
    for width in widths(group, params):
        cut = group.width - width
        now = gone.clone()
        now[choose(scores, group, cut, params)] = True
        share, score = cut / group.width, float(scores[now & ~gone].mean() / mean)
        yield Step(index, cut, share if params.ranking == "uniform" else score)
        gone = now


def choose(scores: torch.Tensor, group: Group, num_cut: int, params: PruneParams) -> torch.Tensor:
    """Choose the lowest scores, as many in each block, or the blocks of the lowest sums: channel numbers, ascending."""
    table, block_width = scores.view(group.blocks, -1), group.width // group.blocks
    if group.attentions and params.heads == "whole":
        blocks = table.sum(dim=1).argsort(stable=True)[: num_cut // block_width]
        lowest = torch.arange(block_width).expand(len(blocks), -1)
    else:
        blocks = torch.arange(group.blocks)
        lowest = table.argsort(dim=1, stable=True)[:, : num_cut // group.blocks]
    return (lowest + blocks[:, None] * block_width).flatten().sort().values


def follow(path: Sequence[Step], num_groups: int) -> Cuts:
    """Make the cuts of a path: how many channels each group has lost at its end."""
    cuts = [0] * num_groups
    for step in path:
        cuts[step.group] = max(cuts[step.group], step.cut)
    return cuts
