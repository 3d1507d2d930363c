"""The folders of a finished compression -> its name, and what a tracking server is to know of it."""

import csv
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stages.runtime.errors import InputError
from stages.runtime.git import git_output
from stages.runtime.schema import flatten

CHUNK_BYTES = 2**24
CONTENT = ("stage", "params", "code_sha256")
"""What names a compression, of each run.json; where and at which commit it ran does not."""


class Compression:
    """All that the stages left of one compression.

    Args:
        artifacts: The folder of model folders.
        reports: The folder of report folders.
    """

    def __init__(self, artifacts: Path, reports: Path) -> None:
        self.model, self.released, self.reports = artifacts / "finetuned", artifacts / "released" / "finetuned", reports
        self.folders = stage_folders(artifacts, reports)

    def id(self) -> str:
        """Name the compression by its content: the params and code that made it and the weights that came of it."""
        content = [
            {key: record[key] for key in CONTENT}
            for stage, record in self.records().items()
            if stage != "costs"  # times vary: the same compression timed twice is one
        ]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        for path in sorted(self.model.rglob("*.safetensors")):
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()

    def records(self) -> dict[str, dict[str, Any]]:
        """Read the run.json of each stage, in order."""
        return {stage: _read_json(folder / "run.json", CONTENT) for stage, folder in self.folders.items()}

    def params(self) -> dict[str, Any]:
        """Flatten the params of all stages to `prune.ratio: 0.3`."""
        return {key: value for record in self.records().values() for key, value in flatten(record["params"])}

    def metrics(self) -> dict[str, float]:
        """Flatten the metrics of all reports to `evaluate.finetuned.fid: 1.2`."""
        found = {path.parent.name: _read_json(path) for path in sorted(self.reports.glob("*/metrics.json"))}
        found["evaluate"] = {
            path.stem: _read_json(path) for path in sorted(self.reports.glob("evaluate/metrics/*.json"))
        }
        return {key: value for key, value in flatten(found) if isinstance(value, int | float)}

    def tags(self) -> dict[str, str]:
        """Name the protocol, the commit of the checkout, and the device on which the costs were measured."""
        record = _read_json(self.reports / "evaluate" / "evaluation.json", {"protocol_id"})
        costs = _read_json(self.folders["costs"] / "costs.json", {"costs"})
        try:
            device = str(costs["costs"][0]["device"])
        except (LookupError, TypeError):
            raise InputError(f"{self.folders['costs'] / 'costs.json'} is not what its stage wrote") from None
        return {
            "espalier.protocol": str(record["protocol_id"]),
            "mlflow.source.git.commit": git_output(Path(), "rev-parse", "--verify", "--quiet", "HEAD") or "",
            "device": device,
        }

    def values(self) -> list[tuple[str, int, float]]:
        """Give metrics and curves as (key, step, value), as far as they are finite.

        Raises:
            InputError: A curve holds something other than numbers.
        """
        metrics = [(key, 0, value) for key, value in self.metrics().items()]
        try:
            found = [*metrics, *self.curves()]
        except ValueError as error:
            raise InputError(f"a curve below {self.reports} is not what its stage wrote ({error})") from None
        return [(key, step, value) for key, step, value in found if math.isfinite(value)]

    def curves(self) -> Iterator[tuple[str, int, float]]:
        """Read the curves as (key, step, value)."""
        for report, name in (("importance", "losses.csv"), ("finetune", "curve.csv")):
            for row in csv.DictReader(_read(self.reports / report / name).decode().splitlines()):
                step_column, *columns = row
                yield from ((f"{report}.{key}", int(row[step_column]), float(row[key])) for key in columns if row[key])


def stage_folders(artifacts: Path, reports: Path) -> dict[str, Path]:
    """Say where every stage that decides something leaves its run.json; report only tells of it."""
    return {
        "fetch": artifacts / "pretrained",
        "reference": artifacts / "reference",
        "importance": artifacts / "importance",
        "prune": artifacts / "pruned",
        "finetune": artifacts / "finetuned",
        "evaluate": reports / "evaluate",
        "costs": reports / "costs",
    }


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; run the pipeline first: make run") from None


def _read_json(path: Path, keys: Iterable[str] = ()) -> dict[str, Any]:
    try:
        value = json.loads(_read(path))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict) or not set(keys) <= set(value):
        raise InputError(f"{path} is not what its stage wrote; run that stage again")
    return value
