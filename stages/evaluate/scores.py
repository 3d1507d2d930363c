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
from stages.protocol.reference import Reference
from stages.runtime.processes import Processes
from stages.storage.rows import array_file, create_together

QUALITY = tuple(field.name for field in fields(Quality))


def by_set(scores: NDArray[np.float64]) -> dict[str, list[float]]:
    """Scores of one model, [sets + 1, QUALITY] -> metric -> value of each set."""
    return {name: scores[:-1, column].tolist() for column, name in enumerate(QUALITY)}


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
            [models, sets + 1, QUALITY]; the last row of a model has the FID of all sets together, and nothing else.
        """
        sets = self.reference.protocol.sets
        scores = array_file(self.folder / "scores.npy", np.float64, (len(names), sets + 1, len(QUALITY)))
        create_together([scores], self.processes)
        places = [(row, name, index) for row, name in enumerate(names) for index in range(sets + 1)]
        for row, name, index in self.processes.share(places):
            if index < sets:
                quality = astuple(self.quality_metrics(self._features(name, slice(index, index + 1)), index))
            else:
                quality = (self.quality_metrics.fid(self._features(name, slice(None))), np.nan, np.nan, np.nan)
            scores.write(row * (sets + 1) + index, np.array([quality]))
        self.processes.wait()
        return scores.read()

    def _features(self, name: str, sets: slice) -> torch.Tensor:
        """Return the features of some sets of a model, one after the other: [N, D]."""
        if name in self.drawn:
            return torch.from_numpy(np.array(self.drawn[name].features.read()[sets])).flatten(0, 1)
        return self.reference.features[sets].flatten(0, 1)
