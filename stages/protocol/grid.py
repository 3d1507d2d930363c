"""grid.json: dense and pruned models over steps, samplers and guidance scales."""

from pathlib import Path

from pydantic import Field, model_validator

from stages.protocol.evaluation import DENSE, Metric
from stages.protocol.intervals import Estimate, paired_difference
from stages.protocol.protocol import Protocol
from stages.runtime.schema import Frozen, Sha256
from stages.storage.files import read_record

SSIM, SSIM_PROTOCOL = "ssim", "ssim_protocol"
"""SSIM against the dense model's image at the same setting, and against its image under the protocol's own setting."""


class GridCell(Frozen):
    """One model at one setting."""

    model: str
    sampler: str
    """Scheduler and spacing, eta where it is not 0, and clipping where it is given."""
    steps: int
    guidance: float | None
    protocol_id: str
    """Id of the protocol of the setting."""
    calls: int = Field(gt=0)
    """Predictions of the model for an image."""
    macs: int = Field(gt=0)
    """Multiply-accumulates of these predictions, without the matrix products inside attention."""
    metrics: dict[str, Metric]
    """fid, kid, precision, recall and ssim_protocol; of pruned models also fid_dense and ssim. above_dense is the
    difference from the dense model at the same setting."""

    @property
    def setting(self) -> tuple[str, int, float | None]:
        """What distinguishes settings: sampler, steps and guidance."""
        return self.sampler, self.steps, self.guidance

    @property
    def row(self) -> str:
        """Name of the row of a table or figure that the cell stands in: sampler and guidance."""
        return self.sampler if self.guidance is None else f"{self.sampler}, guidance {self.guidance:g}"

    def describe(self) -> str:
        """Write the setting for a sentence."""
        guided = "" if self.guidance is None else f", guidance {self.guidance:g}"
        return f"{self.steps} steps of {self.sampler}{guided}"


class GridRecord(Frozen):
    """The cells of a grid, by setting and model."""

    protocol_id: str
    """Id of the protocol of the reference that the grid was drawn beside."""
    protocol: Protocol
    """That protocol, with the images and sets of the grid."""
    weights_sha256: dict[str, Sha256]
    """Model -> the hash of its weights' file."""
    cells: list[GridCell] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> "GridRecord":
        models = set(self.weights_sha256)
        settings = {cell.setting for cell in self.cells}
        found = {(cell.model, *cell.setting) for cell in self.cells}
        if DENSE not in models or found != {(name, *setting) for name in models for setting in settings}:
            raise ValueError("the cells are not those of each model of weights_sha256 at each setting")
        if len(found) != len(self.cells):
            raise ValueError("a cell stands there twice")
        if any(len(it.sets) != self.protocol.sets for cell in self.cells for it in cell.metrics.values()):
            raise ValueError(f"a metric does not have one value for each of the {self.protocol.sets} sets")
        return self

    def of(self, model: str) -> list[GridCell]:
        """Return the cells of a model."""
        return [cell for cell in self.cells if cell.model == model]

    @property
    def others(self) -> list[str]:
        """The models beside the dense one."""
        return [name for name in dict.fromkeys(cell.model for cell in self.cells) if name != DENSE]

    def best(self, model: str) -> GridCell:
        """Return the cell of a model with the lowest FID."""
        return min(self.of(model), key=lambda cell: cell.metrics["fid"].mean)

    def cheapest(self, model: str) -> GridCell:
        """Return the cell with the fewest operations of those whose FID is not distinct from the model's best."""
        best = self.best(model)
        alike = [cell for cell in self.of(model) if cell is best or fid_apart(cell, best).is_distinct is False]
        return min(alike, key=lambda cell: cell.macs)


def fid_apart(cell: GridCell, other: GridCell) -> Estimate:
    """Estimate how far the FID of a cell is above that of another, paired by set."""
    return paired_difference(cell.metrics["fid"].sets, other.metrics["fid"].sets)


def read_grid(folder: Path) -> GridRecord:
    """Read grid.json, which `espalier grid` writes.

    Raises:
        InputError: grid.json is missing, damaged or of another version.
    """
    return read_record(folder / "grid.json", GridRecord, "run espalier grid again, or remove the folder")
