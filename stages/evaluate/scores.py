"""Features of drawn and real images -> the quality of each model and set, shared by processes."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from stages.evaluate.drawn import DrawnFiles
from stages.evaluate.neighbours import neighbour_distances, row_blocks
from stages.evaluate.quality import Quality, QualityMetrics
from stages.protocol.protocol import Protocol
from stages.protocol.reference import Reference
from stages.runtime.processes import Processes
from stages.storage.rows import RowFile, array_file

QUALITY = tuple(field.name for field in fields(Quality))


def score_file(folder: Path, num_models: int, protocol: Protocol) -> RowFile:
    """Describe the file of all scores, [models, sets + 1, QUALITY] float64; the last row has FID of all sets only."""
    return array_file(folder / "scores.npy", np.float64, (num_models, protocol.sets + 1, len(QUALITY)))


def by_set(scores: NDArray[np.float64]) -> dict[str, list[float]]:
    """Scores of one model, [sets + 1, QUALITY] -> metric -> value of each set."""
    return {name: scores[:-1, column].tolist() for column, name in enumerate(QUALITY)}


class Measurer:
    """Measures the quality of sets of images; each set is measured by one process.

    Args:
        reference: Features of the dense model's images and of the real ones.
        drawn: The files of the other models.
        folder: Where the processes exchange the distances between real images.
        processes: Share the real images whose neighbours are searched, and the sets.
    """

    def __init__(
        self, reference: Reference, drawn: Mapping[str, DrawnFiles], folder: Path, processes: Processes
    ) -> None:
        self.reference, self.drawn, self.processes = reference, drawn, processes
        self.quality_metrics = QualityMetrics(
            reference.real_features, reference.protocol, processes.device, self._real_radii(folder)
        )

    def _real_radii(self, folder: Path) -> torch.Tensor:
        """Compute the distance of each real image to its k-th neighbour, and wait until all images are drawn."""
        real, device = self.reference.real_features.double(), self.processes.device
        radii = array_file(folder / "radii.npy", np.float64, (len(real),))
        if self.processes.is_main:
            radii.create()
        self.processes.wait()
        for rows in self.processes.share(row_blocks(len(real), len(real))):
            found = neighbour_distances(real, rows, self.reference.protocol.neighbours, device)
            radii.write(rows.start, found.numpy())
        self.processes.wait()
        return torch.from_numpy(np.array(radii.read()))

    def measure(self, names: Sequence[str], scores: RowFile) -> None:
        """Measure this process's share of the models and sets, and wait for the others."""
        sets = self.reference.protocol.sets
        places = [(row, name, index) for row, name in enumerate(names) for index in range(sets + 1)]
        for row, name, index in self.processes.share(places):
            if index < sets:
                quality = astuple(self.quality_metrics(self._features(name, slice(index, index + 1)), index))
            else:
                quality = (self.quality_metrics.fid(self._features(name, slice(None))), np.nan, np.nan, np.nan)
            scores.write(row * (sets + 1) + index, np.array([quality]))
        self.processes.wait()

    def _features(self, name: str, sets: slice) -> torch.Tensor:
        """Return the features of some sets of a model, one after the other: [N, D]."""
        if name in self.drawn:
            return torch.from_numpy(np.array(self.drawn[name].features.read()[sets])).flatten(0, 1)
        return self.reference.features[sets].flatten(0, 1)
