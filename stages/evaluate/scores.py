"""Features of drawn, dense and real images -> the quality of each model and set, shared by processes."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from stages.evaluate.drawn import DrawnFiles
from stages.evaluate.neighbours import neighbour_distances, row_blocks
from stages.evaluate.quality import Quality, QualityMetrics, Statistics, features_to_statistics, frechet_distance
from stages.protocol.evaluation import DENSE, FID_DENSE, FID_DENSE_UNPAIRED
from stages.protocol.reference import Reference
from stages.runtime.processes import Processes
from stages.storage.rows import array_file, create_together

SCORES = (*(field.name for field in fields(Quality)), FID_DENSE, FID_DENSE_UNPAIRED)


def by_set(scores: NDArray[np.float64]) -> dict[str, list[float]]:
    """Scores of one model, [sets + 1, SCORES] -> metric -> value of each set; one set has no FID_DENSE_UNPAIRED."""
    sets = scores[:-1]
    names = SCORES if len(sets) > 1 else SCORES[:-1]
    return {name: sets[:, column].tolist() for column, name in enumerate(names)}


class Measurer:
    """Measures the quality of sets of images; each set is measured by one process.

    Args:
        reference: Features of the dense model's images and of the real ones.
        drawn: The files of the other models.
        folder: Where the processes exchange what they found.
        processes: Share the real images whose neighbours are searched, and the sets.
    """

    def __init__(
        self, reference: Reference, drawn: Mapping[str, DrawnFiles], folder: Path, processes: Processes
    ) -> None:
        self.reference, self.drawn, self.folder, self.processes = reference, drawn, folder, processes
        self.quality_metrics = QualityMetrics(
            reference.real_features, reference.protocol, processes.device, self._real_radii()
        )
        # A set is compared with the dense sets of its own and of the next index, so that two are needed at a time.
        self._dense = lru_cache(maxsize=2)(lambda index: features_to_statistics(reference.features[index]))

    def _real_radii(self) -> torch.Tensor:
        """Compute the distance of each real image to its k-th neighbour: [M] float64."""
        real, device = self.reference.real_features.double(), self.processes.device
        radii = array_file(self.folder / "radii.npy", np.float64, (len(real),))
        create_together([radii], self.processes)
        for rows in self.processes.share(row_blocks(len(real), len(real))):
            found = neighbour_distances(real, rows, self.reference.protocol.neighbours, device)
            radii.write(rows.start, found.numpy())
        self.processes.wait()
        return torch.from_numpy(np.array(radii.read()))

    def measure(self, names: Sequence[str]) -> NDArray[np.float64]:
        """Measure the images of some models; the processes share models and sets.

        Returns:
            [models, sets + 1, SCORES]; the last row of a model has the FID of all sets together, and nothing else.
        """
        sets = self.reference.protocol.sets
        scores = array_file(self.folder / "scores.npy", np.float64, (len(names), sets + 1, len(SCORES)))
        create_together([scores], self.processes)
        places = [(row, name, index) for index in range(sets + 1) for row, name in enumerate(names)]
        for row, name, index in self.processes.share(places):
            found = self._measure_set(name, index) if index < sets else self._measure_pooled(name)
            scores.write(row * (sets + 1) + index, np.array([found]))
        self.processes.wait()
        return scores.read()

    def _measure_set(self, name: str, index: int) -> tuple[float, ...]:
        """Measure one set of a model: the values of SCORES."""
        features = self._features(name, slice(index, index + 1))
        statistics = self._dense(index) if name == DENSE else features_to_statistics(features)
        quality = self.quality_metrics(features, index, statistics)
        return *astuple(quality), *self._fids_to_dense(name, statistics, index)

    def _measure_pooled(self, name: str) -> tuple[float, ...]:
        pooled = features_to_statistics(self._features(name, slice(None)))
        return self.quality_metrics.fid(pooled), *[np.nan] * (len(SCORES) - 1)

    def _fids_to_dense(self, name: str, statistics: Statistics, index: int) -> tuple[float, float]:
        """FID to the dense set from the same noise, and to the next one, or NaN where there is no other.

        The last set is compared with the first. The dense model is not compared with itself: its images are the same.
        """
        sets = self.reference.protocol.sets
        paired = 0.0 if name == DENSE else frechet_distance(statistics, self._dense(index))
        return paired, frechet_distance(statistics, self._dense((index + 1) % sets)) if sets > 1 else np.nan

    def _features(self, name: str, sets: slice) -> torch.Tensor:
        """Return the features of some sets of a model, one after the other: [N, D]."""
        if name in self.drawn:
            return torch.from_numpy(np.array(self.drawn[name].features.read()[sets])).flatten(0, 1)
        return self.reference.features[sets].flatten(0, 1)
