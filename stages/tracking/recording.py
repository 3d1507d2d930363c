"""A finished compression -> one MLflow run.

The record is saved on disk before it is sent, and deleted when the server has it. A server that is unavailable or stops
in the middle therefore loses nothing, and no run is written twice.
"""

import csv
import re
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import Field

from stages.runtime.errors import InputError, UnavailableError, first_line, warn
from stages.runtime.network import is_outage
from stages.runtime.schema import Frozen, Sha256
from stages.storage.files import make_private, read_record, write_json, writing
from stages.tracking.compression import Compression
from stages.tracking.mlflow_client import connect, find_experiment

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "espalier"
COMPRESSION_TAG = "espalier.compression"
"""Tag of a run: the hash by which a compression is found again."""
SENDER_TAG = "espalier.sender"
"""Tag of a run: the host and folder that sent it."""
RECORD = "record.json"
TABLE = "rows.json"
"""Artifact in the format of MLflow's evaluation view."""
BATCH = 1000
"""Most metrics that MLflow accepts in one request."""


class RunRecord(Frozen):
    """What a run of a compression holds, apart from its artifacts."""

    compression: Sha256
    """Hash of the compression (`Compression.id`)."""
    run_name: str
    finished_ms: int = Field(ge=0)
    """Time at which the record was saved, in milliseconds since 1970."""
    params: dict[str, str]
    tags: dict[str, str]
    values: list[tuple[str, int, float]]
    """Metrics and curves: (key, step, value)."""


def save_record(record: RunRecord, reports: Path, unsent: Path) -> Path:
    """Save the record of a compression with its reports, unless it is saved already.

    Args:
        record: The record.
        reports: The folder of the compression's reports.
        unsent: Folder of saved records.

    Returns:
        The folder of this record.

    Raises:
        InputError: The reports cannot be read, or `unsent` cannot be written.
    """
    folder = unsent / record.compression
    if (folder / RECORD).is_file():
        return folder
    make_private(unsent)
    with writing(folder) as temporary:
        try:
            shutil.copytree(reports, temporary / "reports")
        except OSError as error:  # shutil.Error is an OSError
            raise InputError(f"{reports} cannot be copied to {unsent} ({first_line(error)})") from None
        write_json(temporary / RECORD, record.model_dump(mode="json"))
    return folder


def _make_record(compression: Compression) -> RunRecord:
    try:
        content_id, params = compression.id(), compression.params()
        return RunRecord(
            compression=content_id,
            run_name=f"{params['importance.criterion']}-{content_id[:8]}",
            finished_ms=int(time.time() * 1000),
            params={key: str(value) for key, value in params.items()},
            tags={COMPRESSION_TAG: content_id, **compression.tags()},
            values=compression.values(),
        )
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        OSError,
        RecursionError,
        TypeError,
        ValueError,
        csv.Error,
    ) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(
            f"a file of the compression is not what its stage wrote ({reason}); run the pipeline again"
        ) from None


def send_record(folder: Path) -> tuple[str, bool]:
    """Send a saved record, unless the server has it, and delete it.

    Returns:
        The id of the run, and whether it is new.

    Raises:
        InputError: The record is damaged.
    """
    from filelock import FileLock

    with FileLock(folder.parent / ".lock"):  # one process at a time sends the records of a folder
        client = connect()
        if not folder.exists() and (run_id := find_run(client, folder.name)):
            return run_id, False  # another process sent it while this one waited for the lock
        record = read_record(folder / RECORD, RunRecord, f"remove {folder} and record again")
        run_id = find_run(client, record.compression)
        new = run_id is None
        if run_id is None:
            run_id = _create_run(client, record, folder)
        sent = folder.rename(folder.with_name(f".{folder.name}.sent"))
        shutil.rmtree(sent, ignore_errors=True)
    return run_id, new


def record_compression(compression: Compression, unsent: Path) -> tuple[str, bool]:
    """Save and send the record of a compression; returns the id of its run, and whether it is new.

    Raises:
        InputError: The compression is not finished, or one of its files is damaged.
    """
    return send_record(save_record(_make_record(compression), compression.reports, unsent))


def fetch_report(run_id: str, name: str, folder: Path) -> Path:
    """Download a file of a run's reports into `folder`; returns its path.

    Raises:
        UnavailableError: The server does not answer or does not have the file.
    """
    try:
        return Path(connect().download_artifacts(run_id, f"reports/{name}", str(folder)))
    except Exception as error:  # noqa: BLE001  # whatever a server or MLflow raises
        raise UnavailableError(f"MLflow failed to download {name} of run {run_id} ({first_line(error)})") from None


def list_reports(run_id: str, names: Sequence[str]) -> list[str]:
    """Return those of some files, of the top of a run's reports, that the run has.

    Raises:
        UnavailableError: The server does not answer.
    """
    if not names:
        return []
    try:
        present = {Path(it.path).name for it in connect().list_artifacts(run_id, "reports")}
    except Exception as error:  # noqa: BLE001  # whatever a server or MLflow raises
        raise UnavailableError(f"MLflow failed to list the reports of run {run_id} ({first_line(error)})") from None
    return [name for name in names if name in present]


def record_folder(
    name: str, content: str, params: Mapping[str, str], folder: Path, rows: Sequence[Mapping[str, Any]]
) -> str:
    """Record a folder and a table as the artifacts of one run; a second call replaces them.

    Args:
        name: Name of the run.
        content: Hash by which the run is found again.
        params: Params of the run.
        folder: The folder to upload.
        rows: Rows of the table, all with the same columns.

    Returns:
        The id of the run.

    Raises:
        UnavailableError: The server does not answer or refuses the request.
    """
    from mlflow.entities import Param

    try:
        client = connect()
        run_id = find_run(client, content)
        if run_id is None:
            tags = {COMPRESSION_TAG: content}
            run_id = str(client.create_run(find_experiment(client, EXPERIMENT), tags=tags, run_name=name).info.run_id)
            client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])
            client.log_table(run_id, {key: [row[key] for row in rows] for key in rows[0]}, TABLE)
        else:  # log_table would append the rows to those of the first call
            client.log_dict(run_id, {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}, TABLE)
        client.log_artifacts(run_id, str(folder))
        client.set_terminated(run_id, "FINISHED")
    except Exception as error:  # noqa: BLE001  # whatever a server or MLflow raises
        raise UnavailableError(f"MLflow failed to record {name} ({first_line(error)})") from None
    return run_id


def find_run(client: "MlflowClient", compression: str) -> str | None:
    """Find the finished run of a compression; the oldest if two machines recorded it at the same time."""
    runs = _find_finished_runs(client, compression)
    return str(runs[0].info.run_id) if runs else None


def _find_finished_runs(client: "MlflowClient", compression: str) -> list[Any]:
    return [run for run in _find_runs(client, compression) if run.info.status == "FINISHED"]


def _find_runs(client: "MlflowClient", compression: str) -> list[Any]:
    """List all runs of a compression, the oldest first, including unfinished ones."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    query = f"tags.`{COMPRESSION_TAG}` = '{compression}'"
    order = ["attributes.start_time ASC", "attributes.run_id ASC"]
    return list(client.search_runs([experiment.experiment_id], query, order_by=order))


def _create_run(client: "MlflowClient", record: RunRecord, folder: Path) -> str:
    """Create the run of a record with its metrics and artifacts; returns its id.

    Unfinished runs of the same sender are deleted first. If another machine finished a run meanwhile, the older of the
    two remains.
    """
    from mlflow.entities import Metric, Param

    sender = f"{socket.gethostname()}:{folder.resolve()}"
    for unfinished in _find_runs(client, record.compression):
        if unfinished.info.status != "FINISHED" and unfinished.data.tags.get(SENDER_TAG) == sender:
            client.delete_run(unfinished.info.run_id)
    tags = {SENDER_TAG: sender, **record.tags}
    run = client.create_run(
        find_experiment(client, EXPERIMENT), start_time=record.finished_ms, tags=tags, run_name=record.run_name
    )
    run_id = str(run.info.run_id)
    client.log_batch(run_id, params=[Param(key, value) for key, value in record.params.items()])
    metrics = [Metric(key, value, record.finished_ms, step) for key, step, value in record.values]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH])
    client.log_artifacts(run_id, str(folder / "reports"), "reports")
    client.set_terminated(run_id, "FINISHED")
    finished = _find_finished_runs(client, record.compression)
    for other in finished[1:]:
        client.delete_run(other.info.run_id)
    return str((finished or [run])[0].info.run_id)


def record_all(compression: Compression, unsent: Path, *, allow_offline: bool) -> tuple[str, bool] | None:
    """Record a finished compression in MLflow and send all records saved before; a second call finds the same run.

    Args:
        compression: The finished compression.
        unsent: Folder of records that have not reached the server yet.
        allow_offline: Whether a server that does not answer causes a warning in place of an error.

    Returns:
        The id of the compression's run, and whether it is new; None if the server does not answer.

    Raises:
        InputError: The compression is not finished, or a record is damaged.
        UnavailableError: The server does not answer, and `allow_offline` is False.
    """
    record = _make_record(compression)
    waiting = sorted(path.parent for path in unsent.glob(f"*/{RECORD}") if path.parent.name[0] != ".")
    try:
        known = None if waiting else find_run(connect(), record.compression)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever a server raises
        _report_unsent(save_record(record, compression.reports, unsent), error, allow_offline=allow_offline)
        return None
    if known:
        click.echo(f"MLflow run {known}: this compression was recorded before")
        return known, False
    latest = save_record(record, compression.reports, unsent)
    sent: dict[Path, tuple[str, bool]] = {}
    for folder in [latest, *(other for other in waiting if other != latest)]:
        try:
            sent[folder] = run_id, new = send_record(folder)
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001  # whatever a server or MLflow raises
            _report_unsent(folder, error, allow_offline=allow_offline)
            return None
        click.echo(f"MLflow run {run_id}: {'recorded' if new else 'this compression was recorded before'}")
    return sent[latest]


def _report_unsent(folder: Path, error: Exception, *, allow_offline: bool) -> None:
    message = (
        f"MLflow did not store the record ({first_line(error)}); it is saved in {folder} and sent with the next record "
        "or by: python -m stages.tracking"
    )
    if allow_offline:
        warn(message)
    elif re.search(r"error code 40[13]\b", str(error)):
        advice = "correct MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        raise InputError(f"MLflow refuses the user; the record is saved in {folder}; {advice}") from None
    elif is_outage(error):
        raise UnavailableError(message) from None
    else:
        advice = "correct MLFLOW_TRACKING_URI and run: python -m stages.tracking"
        raise InputError(f"MLflow cannot store the record ({first_line(error)}); it is saved in {folder}; {advice}")
