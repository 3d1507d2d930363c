"""Features of drawn and real images -> FID, KID, precision and recall, through torch-fidelity."""

from dataclasses import dataclass

import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from stages.protocol.protocol import Protocol
from stages.runtime.seeds import derive_seed, generator

AT_ONCE, BLOCK_BYTES = 10_000, 2**30
"""Largest number of rows, and size in bytes, of a block of distances for precision and recall."""


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
    """FID, KID, precision and recall of sets of features; the statistics of the real images are computed once.

    Args:
        real: Features of the real images, [M, D].
        protocol: Gives the subsets of KID and the neighbours of precision and recall.
    """

    def __init__(self, real: torch.Tensor, protocol: Protocol) -> None:
        self.real, self.protocol = real.double(), protocol
        self.statistics = fid_features_to_statistics(self.real)

    def __call__(self, drawn: torch.Tensor, set_index: int = 0) -> Quality:
        """Measure one set of features, [N, D], in float64.

        FID: Heusel et al., 2017, eq. 6; KID: Bińkowski et al., 2018, eq. 4; precision and recall: Kynkäänniemi et al.,
        2019, eq. 1 and 2.
        """
        drawn = drawn.double()
        kid = kid_features_to_metric(
            drawn,
            self.real,
            kid_subsets=self.protocol.kid_subsets,
            kid_subset_size=self.protocol.kid_subset_size,
            rng_seed=derive_seed(self.protocol.seed, "kid subsets", set_index) % 2**32,
            verbose=False,
        )
        prc = prc_features_to_metric(
            drawn,
            self.real,
            prc_neighborhood=self.protocol.neighbours,
            prc_batch_size=max(1, min(AT_ONCE, BLOCK_BYTES // (8 * max(len(drawn), len(self.real))))),
            save_cpu_ram=True,
            verbose=False,
        )
        return Quality(self.fid(drawn), kid[KEY_METRIC_KID_MEAN], prc[KEY_METRIC_PRECISION], prc[KEY_METRIC_RECALL])

    def fid(self, drawn: torch.Tensor) -> float:
        """FID of features, [N, D]."""
        statistics = fid_features_to_statistics(drawn.double())
        return float(fid_statistics_to_metric(statistics, self.statistics, verbose=False)[KEY_METRIC_FID])

    def floor(self) -> float:
        """FID between two random halves of the real images, as a scale; biased upwards, since each half is small."""
        order = torch.randperm(len(self.real), generator=generator(self.protocol.seed, "floor"))
        halves = [fid_features_to_statistics(self.real[half]) for half in order.chunk(2)]
        return float(fid_statistics_to_metric(*halves, verbose=False)[KEY_METRIC_FID])
