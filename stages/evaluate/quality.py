"""Features of drawn and real images -> FID and KID through torch-fidelity, precision and recall."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

from stages.evaluate.neighbours import covered_share, neighbour_distances, row_blocks
from stages.protocol.protocol import Protocol
from stages.runtime.seeds import derive_seed, generator

CPU = torch.device("cpu")
Statistics = Mapping[str, NDArray[np.float64]]
"""Mean [D] and covariance [D, D] of features."""


def features_to_statistics(features: torch.Tensor) -> Statistics:
    """Features [N, D] -> their mean and covariance in float64."""
    statistics: Statistics = fid_features_to_statistics(features.double())
    return statistics


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """Fréchet distance of two Gaussians with these statistics (Heusel et al., 2017, eq. 6)."""
    return float(fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID])


@dataclass(frozen=True)
class Quality:
    """Distance of a set of drawn images from the real images."""

    fid: float
    kid: float
    """Mean over the subsets."""
    precision: float
    """Share of the drawn images inside the manifold of the real images, in [0, 1]."""
    recall: float
    """Share of the real images inside the manifold of the drawn images, in [0, 1]."""


class QualityMetrics:
    """FID, KID, precision and recall of sets of features; what depends on the real images alone is computed once.

    Args:
        real: Features of the real images, [M, D].
        protocol: Gives the subsets of KID and the neighbours of precision and recall.
        device: Where distances are computed, in float64.
        radii: `real_radii` of the same features, [M]; None computes them when they are needed.
    """

    def __init__(
        self, real: torch.Tensor, protocol: Protocol, device: torch.device = CPU, radii: torch.Tensor | None = None
    ) -> None:
        self.real, self.protocol, self.device, self.radii = real.double(), protocol, device, radii
        self.statistics = features_to_statistics(self.real)

    def __call__(self, drawn: torch.Tensor, set_index: int = 0, statistics: Statistics | None = None) -> Quality:
        """Measure one set of features, [N, D], in float64; their statistics are computed unless they are given.

        FID: Heusel et al., 2017, eq. 6; KID: Bińkowski et al., 2018, eq. 4; precision and recall: Kynkäänniemi et al.,
        2019, eq. 1 and 2.
        """
        drawn = drawn.double()
        fid = self.fid(statistics or features_to_statistics(drawn))
        kid = kid_features_to_metric(
            drawn,
            self.real,
            kid_subsets=self.protocol.kid_subsets,
            kid_subset_size=self.protocol.kid_subset_size,
            rng_seed=derive_seed(self.protocol.seed, "kid subsets", set_index) % 2**32,
            verbose=False,
        )
        if self.radii is None:
            self.radii = self._radii(self.real)
        precision = covered_share(drawn, self.real, self.radii, self.device)
        recall = covered_share(self.real, drawn, self._radii(drawn), self.device)
        return Quality(fid, kid[KEY_METRIC_KID_MEAN], precision, recall)

    def _radii(self, features: torch.Tensor) -> torch.Tensor:
        blocks, neighbours = row_blocks(len(features), len(features)), self.protocol.neighbours
        return torch.cat([neighbour_distances(features, rows, neighbours, self.device) for rows in blocks])

    def fid(self, statistics: Statistics) -> float:
        """FID of the features with these statistics."""
        return frechet_distance(statistics, self.statistics)

    def floor(self) -> float:
        """FID between two random halves of the real images, as a scale; biased upwards, since each half is small."""
        order = torch.randperm(len(self.real), generator=generator(self.protocol.seed, "floor"))
        one, other = (features_to_statistics(self.real[half]) for half in order.chunk(2))
        return frechet_distance(one, other)
