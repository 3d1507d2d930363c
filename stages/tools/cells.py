"""A folder of finished cells, one subfolder each -> their overrides and evaluations."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.protocol.costs import CostsRecord, read_costs
from stages.protocol.evaluation import EvaluationRecord, read_evaluation
from stages.runtime.errors import InputError
from stages.runtime.schema import Frozen
from stages.storage.files import read_record

CELL = "cell.json"


class CellRecord(Frozen):
    """The content of cell.json, which a sweep or a comparison writes beside a finished cell's evaluation.json."""

    overrides: dict[str, Any]
    """Dotted key of params.yaml -> the value that the cell set."""
    mlflow_run: str
    ran: tuple[str, ...] = ()
    """Stages that were computed; the outputs of the others came from DVC's cache."""
    row: str = ""
    """Row of the method comparison that the cell belongs to; empty for a sweep."""


@dataclass(frozen=True)
class FinishedCell:
    """One finished cell."""

    name: str
    """Name of its folder."""
    note: CellRecord
    record: EvaluationRecord
    costs: CostsRecord

    @property
    def seed(self) -> int:
        """The seed of its protocol."""
        return self.record.protocol.seed


def in_row(cells: Iterable[FinishedCell], row: str) -> list[FinishedCell]:
    """Return the cells of one row of a comparison."""
    return [cell for cell in cells if cell.note.row == row]


def read_cells(folder: Path) -> list[FinishedCell]:
    """Read all cells below a folder, ordered by seed, then by name.

    Raises:
        InputError: The folder holds no finished cell, or a cell is damaged.
    """
    cells = [
        FinishedCell(
            path.parent.name,
            read_record(path, CellRecord, "remove its folder and run the flow again"),
            read_evaluation(path.parent),
            read_costs(path.parent),
        )
        for path in sorted(folder.glob(f"*/{CELL}"))
    ]
    if not cells:
        raise InputError(f"{folder} holds no finished cell; run the flow sweep or compare first")
    return sorted(cells, key=lambda cell: cell.seed)
