"""A folder with a folder for each finished cell of a series -> what was set and measured."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.protocol.costs import CostsRecord, read_costs
from stages.protocol.evaluation import EvaluationRecord, read_evaluation
from stages.runtime.errors import InputError
from stages.runtime.schema import Frozen
from stages.storage.files import read_json

CELL = "cell.json"


class CellRecord(Frozen):
    """What a sweep or a comparison notes of a finished cell, beside its evaluation.json."""

    overrides: dict[str, Any]
    """What of params.yaml was set."""
    mlflow_run: str
    ran: tuple[str, ...] = ()
    """Stages that computed; the others came from DVC's cache."""
    row: str = ""
    """Of a comparison: which row it belongs to."""


@dataclass(frozen=True)
class FinishedCell:
    """One cell with what was measured of it."""

    name: str
    """Of its folder."""
    cell: CellRecord
    record: EvaluationRecord
    costs: CostsRecord


def read_cells(folder: Path) -> list[FinishedCell]:
    """Read all cells below a folder, in the order of their names.

    Raises:
        InputError: There is none, or one is damaged.
    """
    cells = [
        FinishedCell(path.parent.name, _read_note(path), read_evaluation(path.parent), read_costs(path.parent))
        for path in sorted(folder.glob(f"*/{CELL}"))
    ]
    if not cells:
        raise InputError(f"{folder} holds no finished cell; run the flow first")
    return cells


def _read_note(path: Path) -> CellRecord:
    try:
        return CellRecord.model_validate(read_json(path))
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise InputError(f"{path} is damaged ({reason}); remove its folder and run the flow again") from None
