"""A finished compression -> one MLflow run; this and stages/register/ are the doors to MLflow.

The record is kept on disk before it is sent, and forgotten once the server has it: a server that is away, or dies in
the middle, loses nothing, and nothing is there twice.
"""

import csv
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import Field, ValidationError

from stages.runtime.errors import InputError, UnavailableError, first_line
from stages.runtime.schema import Frozen, Sha256
from stages.tracking.compression import Compression
from stages.tracking.mlflow_client import connect, find_experiment

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "espalier"
COMPRESSION_TAG = "espalier.compression"
SENDER_TAG = "espalier.sender"
"""Which folder of which machine a run was sent from."""
RECORD = "record.json"
TABLE = "rows.json"
"""As MLflow's evaluation view reads it."""
BATCH = 1000
"""Metrics in a call; MLflow takes no more."""


class RunRecord(Frozen):
    """What is sent of a compression, beside its reports."""

    compression: Sha256
    run_name: str
    finished_ms: int = Field(ge=0)
    """When it was kept, in milliseconds since 1970."""
    params: dict[str, str]
    tags: dict[str, str]
    values: list[tuple[str, int, float]]
    """(key, step, value)."""


def save_record(compression: Compression, unsent: Path) -> Path:
    """Write down what a tracking server is to know: the folder in which it waits to be sent.

    Raises:
        InputError: The compression is not finished, something of it is damaged, or the place cannot be written.
    """
    from stages.storage.files import write_json, writing

    record = _read(compression)
    folder = unsent / record.compression
    if (folder / RECORD).is_file():
        return folder
    with writing(folder) as temporary:
        try:
            shutil.copytree(compression.reports, temporary / "reports")
        except OSError as error:  # shutil.Error is one, too
            raise InputError(f"{compression.reports} cannot be kept in {unsent} ({first_line(error)})") from None
        write_json(temporary / RECORD, record.model_dump(mode="json"))
    return folder


def _read(compression: Compression) -> RunRecord:
    try:
        name, params = compression.id(), compression.params()
        return RunRecord(
            compression=name,
            run_name=f"{params['importance.criterion']}-{name[:8]}",
            finished_ms=int(time.time() * 1000),
            params={key: str(value) for key, value in params.items()},
            tags={COMPRESSION_TAG: name, **compression.tags()},
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
            f"a record of the compression is not what its stage wrote ({reason}); run the pipeline again"
        ) from None


def send_record(folder: Path) -> tuple[str, bool]:
    """Send what was kept, unless the server has it: the run's id, and whether it is new. Then forget it here.

    Raises:
        InputError: The folder is damaged.
    """
    from filelock import FileLock

    with FileLock(folder.parent / ".lock"):  # one folder is sent by one process at a time
        client = connect()
        if not folder.exists() and (run_id := find_run(client, folder.name)):
            return run_id, False  # another process sent it while we waited
        record = _read_kept(folder)
        run_id = find_run(client, record.compression)
        new = run_id is None
        if run_id is None:
            run_id = _write(client, record, folder)
        sent = folder.rename(folder.with_name(f".{folder.name}.sent"))
        shutil.rmtree(sent, ignore_errors=True)
    return run_id, new


def record(compression: Compression, unsent: Path) -> tuple[str, bool]:
    """Keep and send a compression: its run's id, and whether it is new."""
    return send_record(save_record(compression, unsent))


def fetch_report(run_id: str, name: str, folder: Path) -> Path:
    """Download a file of a run's reports: where it lies now.

    Raises:
        UnavailableError: The server does not give it.
    """
    try:
        return Path(connect().download_artifacts(run_id, f"reports/{name}", str(folder)))
    except Exception as error:  # noqa: BLE001  # any fault of a server
        raise UnavailableError(f"MLflow does not give {name} of run {run_id} ({first_line(error)})") from None


def record_folder(
    name: str, content: str, params: Mapping[str, str], folder: Path, rows: Sequence[Mapping[str, Any]]
) -> str:
    """Make sure that a folder and a table are there as the artifacts of a run of its own: the run's id.

    Args:
        name: Of the run.
        content: What tells it from others; the same content has one run, which gets the folder anew.
        params: Of the run.
        folder: What to send.
        rows: Of the table, all with the same columns.

    Raises:
        UnavailableError: The server does not take it.
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
        else:  # log_table would put the rows below those of the last time
            client.log_dict(run_id, {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}, TABLE)
        client.log_artifacts(run_id, str(folder))
        client.set_terminated(run_id, "FINISHED")
    except Exception as error:  # noqa: BLE001  # any fault of a server
        raise UnavailableError(f"MLflow does not take {name} ({first_line(error)})") from None
    return run_id


def find_run(client: "MlflowClient", compression: str) -> str | None:
    """Find the finished run of a compression, the oldest if two machines wrote one at the same moment."""
    runs = [run for run in _find_runs(client, compression) if run.info.status == "FINISHED"]
    return str(runs[0].info.run_id) if runs else None


def _find_runs(client: "MlflowClient", compression: str) -> list[Any]:
    """Find all runs of a compression, the oldest first; those that never ended are among them."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return []
    query = f"tags.`{COMPRESSION_TAG}` = '{compression}'"
    order = ["attributes.start_time ASC", "attributes.run_id ASC"]
    return list(client.search_runs([experiment.experiment_id], query, order_by=order))


def _write(client: "MlflowClient", record: RunRecord, folder: Path) -> str:
    """Write the run whole; what this sender left by halves goes, and of two finished at once the older stays."""
    from mlflow.entities import Metric, Param

    sender = f"{socket.gethostname()}:{folder.resolve()}"
    for half in _find_runs(client, record.compression):
        if half.info.status != "FINISHED" and half.data.tags.get(SENDER_TAG) == sender:
            client.delete_run(half.info.run_id)
    tags = {SENDER_TAG: sender, **record.tags}
    run = client.create_run(
        find_experiment(client, EXPERIMENT), start_time=record.finished_ms, tags=tags, run_name=record.run_name
    )
    run_id = str(run.info.run_id)
    client.log_batch(run_id, params=[Param(key, value) for key, value in record.params.items()])
    rows = [Metric(key, value, record.finished_ms, step) for key, step, value in record.values]
    for start in range(0, len(rows), BATCH):
        client.log_batch(run_id, metrics=rows[start : start + BATCH])
    client.log_artifacts(run_id, str(folder / "reports"), "reports")
    client.set_terminated(run_id, "FINISHED")
    finished = [run for run in _find_runs(client, record.compression) if run.info.status == "FINISHED"]
    for other in finished[1:]:
        client.delete_run(other.info.run_id)
    return str((finished or [run])[0].info.run_id)


def _read_kept(folder: Path) -> RunRecord:
    from stages.storage.files import read_json

    try:
        return RunRecord.model_validate(read_json(folder / RECORD))
    except ValidationError as error:
        reason = f"{error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
        raise InputError(f"{folder / RECORD} is damaged ({reason}); remove {folder} and record again") from None


def record_all(compression: Compression, unsent: Path, *, allow_offline: bool) -> tuple[str, bool] | None:
    """Record a finished compression in MLflow, however often this is called, and all that still wait to be sent.

    Args:
        compression: What to record.
        unsent: The folder in which records wait for the server.
        allow_offline: Whether a server that is away is only warned of.

    Returns:
        The id of the compression's run, and whether it is new; None while the server is away.

    Raises:
        InputError: The compression is not finished, or a record is damaged.
        UnavailableError: The server is away, which is not allowed.
    """
    waiting = sorted(path.parent for path in unsent.glob(f"*/{RECORD}") if path.parent.name[0] != ".")
    try:
        known = None if waiting else find_run(connect(), compression.id())
    except Exception as error:  # noqa: BLE001  # any fault of a server; a fault of a folder is raised by save_record
        _warn_of_unsent(save_record(compression, unsent), error, allow_offline=allow_offline)
        return None
    if known:
        click.echo(f"MLflow run {known}: this compression was recorded before")
        return known, False
    latest = save_record(compression, unsent)
    sent: dict[Path, tuple[str, bool]] = {}
    for folder in [latest, *(other for other in waiting if other != latest)]:
        try:
            sent[folder] = run_id, new = send_record(folder)
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001  # any fault of a server
            _warn_of_unsent(folder, error, allow_offline=allow_offline)
            return None
        click.echo(f"MLflow run {run_id}: {'recorded' if new else 'this compression was recorded before'}")
    return sent[latest]


def _warn_of_unsent(folder: Path, error: Exception, *, allow_offline: bool) -> None:
    message = (
        f"MLflow did not take the record ({first_line(error)}); it is kept in {folder} and goes with the next one, or "
        "by: python -m stages.tracking"
    )
    if not allow_offline:
        raise UnavailableError(message) from None
    click.echo(f"Warning: {message}", err=True)
