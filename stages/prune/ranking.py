"""The importance of a model and a seed -> the scores by which the channels of each group are ranked."""

from collections.abc import Collection, Sequence

import torch

from stages.models.groups import Group
from stages.models.saliency import Importance
from stages.models.scores import KeptIndices, score_group, score_halves, share_scores


class Ranking:
    """Scores of channels, measured or, for the criterion random, drawn.

    Args:
        groups: The groups of the dense model.
        importance: Its importance.
        gated: Indices of the groups whose values and gates are ranked apart.
        seed: Seed of the scores of the criterion random.
    """

    def __init__(self, groups: Sequence[Group], importance: Importance, gated: Collection[int], seed: int) -> None:
        self.groups, self.importance, self.gated = groups, importance, gated
        draws = torch.Generator().manual_seed(seed)
        drawn = [torch.rand(group.width, generator=draws) for group in groups]
        self.drawn = [share_scores(scores, group, importance) for scores, group in zip(drawn, groups, strict=True)]
        self.drawn_halves = {index: torch.rand(2 * groups[index].width, generator=draws) for index in sorted(gated)}

    def channels(self, index: int, kept: KeptIndices) -> torch.Tensor:
        """Score the channels of a group [width] by the weights of the channels that are kept."""
        return score_group(self.groups[index], self.importance, kept) if self.importance.saliency else self.drawn[index]

    def halves(self, index: int, kept: KeptIndices) -> torch.Tensor:
        """Score the values and gates of a gated group [2·width]."""
        if not self.importance.saliency:
            return self.drawn_halves[index]
        return score_halves(self.groups[index], self.importance, kept)
