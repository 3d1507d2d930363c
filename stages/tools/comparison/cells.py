"""A folder of finished cells, one subfolder each -> their overrides and evaluations."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.protocol.costs import CostsRecord, read_costs, read_variant_costs
from stages.protocol.evaluation import EvaluationRecord, read_evaluation
from stages.protocol.variants import VARIANTS_FILE, VariantsRecord, read_variants
from stages.runtime.errors import InputError
from stages.runtime.schema import Frozen
from stages.storage.files import read_record

CELL = "cell.json"
COSTS_FOLDER = "costs"
"""Subfolder of a cell with the times of its variants, whose file has the name of that of their quality."""


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
    variants: VariantsRecord | None = None
    """Their quality; None if the cell has none."""
    variant_costs: CostsRecord | None = None
    """Times of models and variants; None without variants, and in cells of before December 2026."""

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
    cells = [_read_cell(path.parent) for path in sorted(folder.glob(f"*/{CELL}"))]
    if not cells:
        raise InputError(f"{folder} holds no finished cell; run the flow sweep or compare first")
    return sorted(cells, key=lambda cell: cell.seed)


def _read_cell(folder: Path) -> FinishedCell:
    note = read_record(folder / CELL, CellRecord, "remove its folder and run the flow again")
    record = read_evaluation(folder)
    variants = _read_variants(folder, record) if (folder / VARIANTS_FILE).is_file() else None
    times = read_variant_costs(folder / COSTS_FOLDER)
    if variants and times and not variants.variants.keys() <= times.weights_sha256.keys():
        raise InputError(f"{folder.name} lacks times of some of its variants; remove its folder and run the flow again")
    return FinishedCell(folder.name, note, record, read_costs(folder), variants, times)


def _read_variants(folder: Path, evaluation: EvaluationRecord) -> VariantsRecord | None:
    record = read_variants(folder)
    if record.variants and record.protocol_id != evaluation.protocol_id:
        found = f"{folder.name} has variants of protocol {record.protocol_id} and models of {evaluation.protocol_id}"
        raise InputError(f"{found}; remove its folder and run the flow again")
    return record if record.variants else None
