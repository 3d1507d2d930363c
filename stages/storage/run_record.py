"""run.json of an output folder -> its fields, each of its type."""

from pathlib import Path
from typing import Any

from pydantic import Field

from stages.runtime.schema import Frozen
from stages.storage.files import RUN_RECORD, read_record


class StageRecord(Frozen, extra="allow"):
    """run.json."""

    stage: str
    params: dict[str, Any]
    python: str = ""
    packages: dict[str, str] = Field(default_factory=dict)
    """Name of a package -> its version."""


def read_run_record(folder: Path) -> dict[str, Any]:
    """Read run.json of an output folder: stage, params, python and packages.

    Raises:
        InputError: It is missing, damaged, or has a value of another type.
    """
    return read_record(folder / RUN_RECORD, StageRecord, "run its stage again").model_dump(exclude_unset=True)
