"""The folders of a finished compression -> its hash, params, metrics and tags."""

import csv
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from stages.runtime.errors import InputError
from stages.runtime.schema import flatten
from stages.storage.files import RUN_RECORD, file_sha256, read_bytes, read_json
from stages.storage.run_record import read_provenance, read_run_record
from stages.tracking.presentation import DatasetRecord, short_name, source_tags, without_folders

CONTENT = ("stage", "params", "code_sha256")
"""What identifies a compression, of the record of each stage."""


class Compression:
    """The outputs of one finished compression.

    Args:
        artifacts: The folder of model folders.
        reports: The folder of report folders.
    """

    def __init__(self, artifacts: Path, reports: Path) -> None:
        self.model, self.released, self.reports = artifacts / "finetuned", artifacts / "released" / "finetuned", reports
        self.folders = stage_folders(artifacts, reports)
        self.code, self.data = artifacts / "code", artifacts / "data"

    def id(self) -> str:
        """Hash the params and code of the stages, the weights of the finetuned model, and the device that was timed.

        Times that are measured again on the same device leave it the same compression.
        """
        content = [{key: record[key] for key in CONTENT} for record in self.records().values()]
        weights = [file_sha256(path) for path in sorted(self.model.rglob("*.safetensors"))]
        return hashlib.sha256(json.dumps([content, weights, self._device()], sort_keys=True).encode()).hexdigest()

    def records(self) -> dict[str, dict[str, Any]]:
        """Read the run.json of each stage and the hash of the code that it ran, in the order of the stages."""
        return {
            stage: {
                **_read_run_record(folder),
                "code_sha256": _read_json(self.code / f"{stage}.json", {"sha256"})["sha256"],
            }
            for stage, folder in self.folders.items()
        }

    def blocks(self) -> dict[str, Any]:
        """Read the params of all stages: block -> its params."""
        return {key: block for record in self.records().values() for key, block in record["params"].items()}

    def params(self) -> dict[str, Any]:
        """Read the params of all stages, flattened to keys like prune.ratio."""
        return dict(flatten(self.blocks()))

    def metrics(self) -> dict[str, float]:
        """Read the metrics of all reports, flattened to keys like evaluate.finetuned.fid."""
        reports = {path.parent.name: _read_json(path) for path in sorted(self.reports.glob("*/metrics.json"))}
        reports["evaluate"] = {
            path.stem: _read_json(path) for path in sorted(self.reports.glob("evaluate/metrics/*.json"))
        }
        return {key: value for key, value in flatten(reports) if isinstance(value, int | float)}

    def tags(self) -> dict[str, str]:
        """Return the protocol, the commit of the checkout, and the device on which the costs were measured."""
        record = _read_json(self.reports / "evaluate" / "evaluation.json", {"protocol_id"})
        return {
            "espalier.protocol": str(record["protocol_id"]),
            "device": self._device(),
            **source_tags(),
        }

    def _device(self) -> str:
        """Return the device on which the costs were measured."""
        path = self.folders["costs"] / "costs.json"
        try:
            return str(_read_json(path, {"costs"})["costs"][0]["device"])
        except (LookupError, TypeError):
            raise _unexpected(path) from None

    def datasets(self) -> list[DatasetRecord]:
        """Describe the images that the stages used: those of `fetch`, and those that quality was measured against."""
        if not (self.data / "dataset.json").is_file():
            return []  # DVC needs no data for a compression that is up to date
        data = read_json(self.data / "dataset.json")
        source = {key: without_folders(value) for key, value in data["source"].items() if value is not None}
        protocol = _read_json(self.reports / "evaluate" / "evaluation.json").get("protocol") or {}
        used = [("calibration and recovery", data["sha256"], data["train"])]
        if protocol:
            used.append(("real images", protocol["real_sha256"], protocol["num_real_images"]))
        return [
            DatasetRecord(name=short_name(source), digest=digest[:16], source=source, num_images=count, context=context)
            for context, digest, count in used
        ]

    def time_of_work(self) -> tuple[float, float] | None:
        """Return begin and end in seconds since 1970: the end of the last stage, and the seconds of all before it.

        What the stages took on several days is thus counted, and not the time between. None where no stage's is known.
        """
        found = [read_provenance(folder) for folder in self.folders.values()]
        times = [
            (datetime.fromisoformat(it["began_at"]).timestamp(), float(it["seconds"]))
            for it in found
            if it and {"began_at", "seconds"} <= it.keys()
        ]
        if not times:
            return None
        end = max(began + seconds for began, seconds in times)
        return end - sum(seconds for _, seconds in times), end

    def values(self) -> list[tuple[str, int, float]]:
        """Return all finite metrics and points of curves as (key, step, value).

        Raises:
            InputError: A curve holds something other than numbers.
        """
        metrics = [(key, 0, value) for key, value in self.metrics().items()]
        try:
            values = [*metrics, *self.curves()]
        except ValueError as error:
            raise InputError(f"a curve below {self.reports} is not what its stage wrote ({error})") from None
        return [(key, step, value) for key, step, value in values if math.isfinite(value)]

    def curves(self) -> Iterator[tuple[str, int, float]]:
        """Read the curves as (key, step, value); the first column of their CSV files is the step."""
        for report, name in (("importance", "losses.csv"), ("finetune", "curve.csv")):
            for row in csv.DictReader(read_bytes(self.reports / report / name).decode().splitlines()):
                step_column, *columns = row
                yield from ((f"{report}.{key}", int(row[step_column]), float(row[key])) for key in columns if row[key])


def stage_folders(artifacts: Path, reports: Path) -> dict[str, Path]:
    """Return the folder with the run.json of each stage; report is left out, since it computes no result."""
    return {
        "fetch": artifacts / "pretrained",
        "reference": artifacts / "reference",
        "importance": artifacts / "importance",
        "prune": artifacts / "pruned",
        "rounds": artifacts / "rounds",
        "finetune": artifacts / "finetuned",
        "evaluate": reports / "evaluate",
        "variants": artifacts / "variants",
        "costs": reports / "costs",
    }


def _read_json(path: Path, keys: Iterable[str] = ()) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path} does not exist; run the pipeline first: espalier run")
    value = read_json(path)
    if not set(keys) <= set(value):
        raise _unexpected(path)
    return value


def _read_run_record(folder: Path) -> dict[str, Any]:
    _read_json(folder / RUN_RECORD)  # says what to run where it is missing
    try:
        return read_run_record(folder)
    except InputError:
        raise _unexpected(folder / RUN_RECORD) from None


def _unexpected(path: Path) -> InputError:
    return InputError(f"{path} is not what its stage wrote; run that stage again")
