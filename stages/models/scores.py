"""Saliencies and the channels kept so far -> the scores of a group's channels, or of the halves of GEGLU."""

import torch

from stages.models.groups import Group, Member
from stages.models.saliency import Importance

KeptIndices = dict[tuple[str, int], torch.Tensor]
"""(layer, dim) -> the kept channels, numbered as in the dense model; sides that belong to no group are absent."""


def score_group(group: Group, importance: Importance, kept: KeptIndices) -> torch.Tensor:
    """Score the channels of a group [width]: the sum over its layers of |Σ saliency| over the remaining weights.

    See `share_scores` for the formula ldm.
    """
    scores = torch.zeros(group.width)
    for member in group.members:
        saliency = importance.saliency.get(member.layer)
        if saliency is None:
            continue
        reads = member.dim == 1 or member.norm  # a layer that feeds the group in chunks always counts
        if reads and len(member.channels) > group.width and not importance.counts_doubled:
            continue
        scores.scatter_add_(0, member.roots, _score_member(saliency, member, kept))
    return share_scores(scores, group, importance)


def share_scores(scores: torch.Tensor, group: Group, importance: Importance) -> torch.Tensor:
    """Under the formula ldm give every norm group or head the scores of the first one, so that all lose the same."""
    if importance.formula != "ldm":
        return scores
    return scores.view(group.blocks, -1)[0].repeat(group.blocks)


def score_halves(group: Group, importance: Importance, kept: KeptIndices) -> torch.Tensor:
    """Score the values and gates of a gated group [2·width] by their own weights, as the original's LDM code does."""
    (root,) = (member for member in group.members if (member.layer, member.dim) == (group.root, 0))
    scores = torch.empty(2 * group.width)
    scores[root.channels] = _score_member(importance.saliency[root.layer], root, kept)
    return scores


def _score_member(saliency: torch.Tensor, member: Member, kept: KeptIndices) -> torch.Tensor:
    chosen = saliency.index_select(member.dim, member.channels)
    other = kept.get((member.layer, 1 - member.dim))
    if other is not None and saliency.ndim > 1:
        chosen = chosen.index_select(1 - member.dim, other)
    return chosen.transpose(0, member.dim).flatten(1).sum(1).abs() if saliency.ndim > 1 else chosen.abs()
