"""The folders of a finished compression -> one MLflow run; this is the one door to MLflow."""

import csv
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stages import telemetry
from stages.errors import InputError, first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "espalier"
COMPRESSION_TAG = "espalier.compression"
SETTINGS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_LOGGING_LEVEL": "WARNING"}
"""Defaults that the environment may overrule."""
CONTENT = ("stage", "params", "code_sha256")
"""What names a compression, of each run.json; where and at which commit it ran does not."""


class Compression:
    """All that the stages left of one compression.

    Args:
        artifacts: The folder of model folders.
        reports: The folder of report folders.
    """

    def __init__(self, artifacts: Path, reports: Path) -> None:
        from stages.artifacts import stage_homes

        self.model, self.released, self.reports = artifacts / "finetuned", artifacts / "released" / "finetuned", reports
        self.homes = stage_homes(artifacts, reports)

    def id(self) -> str:
        """Name the compression by its content: the params and code that made it and the weights that came of it."""
        content = [{key: record[key] for key in CONTENT} for record in self.records()]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        for path in sorted(self.model.rglob("*.safetensors")):
            digest.update(_read(path))
        return digest.hexdigest()

    def records(self) -> Iterator[dict[str, Any]]:
        """Read every stage's run.json, in order."""
        return (_read_json(home / "run.json", {*CONTENT, "git_commit", "device"}) for home in self.homes.values())

    def params(self) -> dict[str, Any]:
        """Flatten the params of all stages to `prune.ratio: 0.3`."""
        return {key: value for record in self.records() for key, value in flatten(record["params"])}

    def metrics(self) -> dict[str, float]:
        """Flatten the metrics of all reports to `evaluate.finetuned.fid: 1.2`."""
        found = {path.parent.name: _read_json(path) for path in sorted(self.reports.glob("*/metrics.json"))}
        found["evaluate"] = {
            path.stem: _read_json(path) for path in sorted(self.reports.glob("evaluate/metrics/*.json"))
        }
        return {key: value for key, value in flatten(found) if isinstance(value, int | float)}

    def tags(self) -> dict[str, str]:
        """Name the protocol, the commit and the device of what was measured."""
        record = _read_json(self.reports / "evaluate" / "evaluation.json", {"protocol_id"})
        *_, last = self.records()
        try:
            device = str(last["device"]["name"])
        except (KeyError, TypeError):
            raise InputError(f"{self.homes['evaluate'] / 'run.json'} is not what its stage wrote") from None
        return {
            "espalier.protocol": str(record["protocol_id"]),
            "mlflow.source.git.commit": last["git_commit"] or "",
            "device": device,
        }

    def values(self) -> list[tuple[str, int, float]]:
        """Give metrics and curves as (key, step, value), as far as they are finite.

        Raises:
            InputError: A curve holds something other than numbers, or there is no released model.
        """
        if not list(self.released.rglob("*.safetensors")):
            raise InputError(f"{self.released} holds no model; run the report stage first")
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


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": {"b": 1}} -> ("a.b", 1)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


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


def record(compression: Compression) -> tuple[str, bool]:
    """Write the compression to MLflow unless it is there already: its run's id, and whether it is new."""
    telemetry.switch_off()
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    client, name = MlflowClient(), compression.id()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT)
    known = client.search_runs(
        [experiment_id], f"tags.`{COMPRESSION_TAG}` = '{name}' and attributes.status = 'FINISHED'"
    )
    if known:
        return known[0].info.run_id, False
    return _write(client, experiment_id, compression, name), True


def _write(client: "MlflowClient", experiment_id: str, compression: Compression, name: str) -> str:
    from mlflow.entities import Metric, Param, RunTag

    values = compression.values()
    params = [Param(key, str(value)) for key, value in compression.params().items()]
    tags = {COMPRESSION_TAG: name, **compression.tags()}
    run = client.create_run(experiment_id, run_name=f"{compression.params()['importance.criterion']}-{name[:8]}")
    run_id, begin = str(run.info.run_id), run.info.start_time
    rows = [Metric(key, value, begin, step) for key, step, value in values]
    try:
        client.log_batch(run_id, params=params, tags=[RunTag(key, value) for key, value in tags.items()])
        for start in range(0, len(rows), 1000):
            client.log_batch(run_id, metrics=rows[start : start + 1000])
        client.log_artifacts(run_id, str(compression.reports), "reports")
        client.log_artifacts(run_id, str(compression.released), "model")
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")
    return run_id


@click.command()
@click.option("--artifacts", type=Path, default=Path("artifacts"), help="The model folders.")
@click.option("--reports", type=Path, default=Path("reports"), help="The report folders.")
@click.option("--allow-offline", is_flag=True, help="Only warn when MLflow cannot be reached.")
def main(artifacts: Path, reports: Path, *, allow_offline: bool) -> None:
    """Record the finished compression as one MLflow run, however it was started and how often this is called."""
    compression = Compression(artifacts, reports)
    try:
        run_id, new = record(compression)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  # any fault of a server
        message = (
            f"MLflow did not take the record ({first_line(error)}); record it later with: python -m stages.tracking"
        )
        if not allow_offline:
            raise InputError(message) from None
        click.echo(f"Warning: {message}", err=True)
    else:
        click.echo(f"MLflow run {run_id}: {'recorded' if new else 'this compression was recorded before'}")


if __name__ == "__main__":
    main()
