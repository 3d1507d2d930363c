"""A finished compression -> one MLflow run.

The record is saved on disk before it is sent, and deleted when the server has it. A server that is unavailable or stops
in the middle therefore loses nothing, and no run is written twice.
"""

import csv
import re
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from stages.runtime.errors import InputError, UnavailableError, first_line, warn
from stages.runtime.network import is_outage
from stages.storage.files import make_private, read_record, write_json, writing
from stages.tracking.compression import Compression
from stages.tracking.mlflow_client import connect, find_experiment
from stages.tracking.presentation import describe, first_metrics, run_name, without_folders
from stages.tracking.runs import (
    COMPRESSION_TAG,
    EXPERIMENT,
    SENDER_TAG,
    RunRecord,
    create_run,
    delete_unfinished,
    find_run,
)

RECORD = "record.json"
TABLE = "rows.json"
"""Artifact in the format of MLflow's evaluation view."""


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
        content_id, metrics = compression.id(), compression.metrics()
        began, ended = compression.time_of_work() or (time.time(), time.time())
        return RunRecord(
            compression=content_id,
            run_name=run_name(compression.blocks()),
            started_ms=int(began * 1000),
            finished_ms=int(ended * 1000),
            description=describe(metrics, compression.reports),
            datasets=compression.datasets(),
            params={key: without_folders(value) for key, value in compression.params().items()},
            tags={COMPRESSION_TAG: content_id, **compression.tags()},
            values=[*((name, 0, value) for name, value in first_metrics(metrics).items()), *compression.values()],
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
        record = _read_saved(folder)
        run_id = find_run(client, record.compression)
        new = run_id is None
        if run_id is None:
            run_id = create_run(client, record, folder)
        _remove_sent(folder)
    return run_id, new


def _read_saved(folder: Path) -> RunRecord:
    remedy = f"remove {folder} and record again"
    record = read_record(folder / RECORD, RunRecord, remedy)
    if not (folder / "reports").is_dir():
        raise InputError(f"{folder} is damaged (it has no reports); {remedy}")
    return record


def _remove_sent(folder: Path) -> None:
    """Remove a record that the server has, and what an earlier removal left; a part of it is never sent again."""
    try:
        folder.rename(folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.sent"))
    except OSError as error:
        warn(f"{folder} was sent and cannot be removed ({first_line(error)}); remove it")
    for sent in folder.parent.glob(".*.sent"):
        shutil.rmtree(sent, ignore_errors=True)


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
    """Return those of some files, named by their paths below a run's reports, that the run has.

    Raises:
        UnavailableError: The server does not answer.
    """
    folders = {str(Path("reports", name).parent) for name in names}
    try:
        present = {it.path for folder in folders for it in connect().list_artifacts(run_id, folder)}
    except Exception as error:  # noqa: BLE001  # whatever a server or MLflow raises
        raise UnavailableError(f"MLflow failed to list the reports of run {run_id} ({first_line(error)})") from None
    return [name for name in names if f"reports/{name}" in present]


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
            tags = {COMPRESSION_TAG: content, SENDER_TAG: delete_unfinished(client, content, folder)}
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


def record_all(compression: Compression, unsent: Path, *, allow_offline: bool) -> tuple[str, bool] | None:
    """Record a finished compression in MLflow and send all records saved before; a second call finds the same run.

    Args:
        compression: The finished compression.
        unsent: Folder of records that have not reached the server yet.
        allow_offline: Whether a server that does not answer causes a warning in place of an error.

    Returns:
        The id of the compression's run, and whether it is new; None if the server does not answer.

    Raises:
        InputError: The compression is not finished, or its record is damaged; another damaged one causes a warning.
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
    return _send_records(latest, [folder for folder in waiting if folder != latest], allow_offline=allow_offline)


def _send_records(latest: Path, waiting: Sequence[Path], *, allow_offline: bool) -> tuple[str, bool] | None:
    """Send a record and those saved before; returns the run of the first and whether it is new, or None.

    Raises:
        InputError: The record is damaged or refused; another such one causes a warning.
        UnavailableError: The server does not answer, and `allow_offline` is False.
    """
    sent: dict[Path, tuple[str, bool]] = {}
    for folder in (latest, *waiting):
        try:
            sent[folder] = run_id, new = send_record(folder)
        except InputError as error:
            if folder == latest:
                raise
            warn(error.message)
            continue
        except Exception as error:  # noqa: BLE001  # whatever a server or MLflow raises
            if folder == latest:
                _report_unsent(folder, error, allow_offline=allow_offline)
                return None
            warn(f"MLflow did not store the record in {folder} ({first_line(error)}); it is sent with the next one")
            if is_outage(error):
                break
            continue
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
