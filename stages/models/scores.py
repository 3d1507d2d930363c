"""Saliencies and the channels kept so far -> the score of every channel of a group."""

import torch

from stages.models.groups import Group, Member
from stages.models.saliency import Importance

KeptIndices = dict[tuple[str, int], torch.Tensor]
"""(layer, dim) -> the kept channels, numbered as in the dense model; sides that belong to no group are absent."""


def score_group(group: Group, importance: Importance, kept: KeptIndices) -> torch.Tensor:
    """Score the channels of a group [width]: the sum over its layers of |Σ saliency| over the remaining weights."""
    scores = torch.zeros(group.width)
    for member in group.members:
        saliency = importance.saliency.get(member.layer)
        if saliency is None:
            continue
        reads = member.dim == 1 or member.norm  # a layer that feeds the group in chunks always counts
        if reads and len(member.channels) > group.width and not importance.counts_doubled:
            continue
        scores.scatter_add_(0, member.roots, _score_member(saliency, member, kept))
    return scores


def _score_member(saliency: torch.Tensor, member: Member, kept: KeptIndices) -> torch.Tensor:
    chosen = saliency.index_select(member.dim, member.channels)
    other = kept.get((member.layer, 1 - member.dim))
    if other is not None and saliency.ndim > 1:
        chosen = chosen.index_select(1 - member.dim, other)
    return chosen.transpose(0, member.dim).flatten(1).sum(1).abs() if saliency.ndim > 1 else chosen.abs()
