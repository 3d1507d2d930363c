"""run.json of an output folder, and the provenance beside it -> their fields, each of its type."""

from pathlib import Path
from typing import Any

from pydantic import Field

from stages.runtime.errors import InputError
from stages.runtime.schema import Frozen
from stages.storage.files import RUN_RECORD, folder_sha256, read_record


class StageRecord(Frozen, extra="allow"):
    """run.json."""

    stage: str
    params: dict[str, Any]
    python: str = ""
    packages: dict[str, str] = Field(default_factory=dict)
    """Name of a package -> its version."""


class Provenance(Frozen, extra="allow"):
    """NAME.provenance.json; a training adds further keys."""

    output_sha256: str
    """`folder_sha256` of the output."""
    device: dict[str, bool | int | str]
    code_sha256: str = ""
    git_commit: str | None = None
    git_dirty: bool = False


def read_run_record(folder: Path) -> dict[str, Any]:
    """Read run.json of an output folder: stage, params, python and packages.

    Raises:
        InputError: It is missing, damaged, or has a value of another type.
    """
    return read_record(folder / RUN_RECORD, StageRecord, "run its stage again").model_dump(exclude_unset=True)


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """Read with which code, where, when and at which commit a stage wrote a folder.

    Returns:
        None where that is not known: the folder came out of DVC's cache and differs from what the last run wrote.
    """
    path = provenance_path(folder)
    try:
        record = read_record(path, Provenance, "remove it").model_dump(exclude_unset=True)
    except InputError:
        return None
    return record if record.get("output_sha256") == folder_sha256(folder) else None


def provenance_path(folder: Path) -> Path:
    """Return the path of the provenance of an output folder."""
    return folder.with_name(f"{folder.name}.provenance.json")
