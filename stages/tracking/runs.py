"""The record of a compression -> one run on MLflow's server, found again by the compression's hash."""

import hashlib
import json
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from stages.runtime.schema import Frozen, Sha256
from stages.tracking.mlflow_client import find_experiment
from stages.tracking.presentation import DatasetRecord, show_picture

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "espalier"
COMPRESSION_TAG = "espalier.compression"
"""Tag of a run: the hash by which a compression is found again."""
SENDER_TAG = "espalier.sender"
"""Tag of a run: a hash of the host and folder that sent it."""
BATCH = 1000
"""Most metrics that MLflow accepts in one request."""


class RunRecord(Frozen):
    """What a run of a compression holds, apart from its artifacts."""

    compression: Sha256
    """Hash of the compression (`Compression.id`)."""
    run_name: str
    started_ms: int | None = Field(None, ge=0)
    """Begin of the work, in milliseconds since 1970; None in records from before the field."""
    finished_ms: int = Field(ge=0)
    """End of the work; the time at which the record was saved where that is unknown."""
    description: str = ""
    """Markdown for MLflow's pages."""
    datasets: list[DatasetRecord] = Field(default_factory=list)
    params: dict[str, str]
    tags: dict[str, str]
    values: list[tuple[str, int, float]]
    """Metrics and curves: (key, step, value)."""


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


def delete_unfinished(client: "MlflowClient", compression: str, folder: Path) -> str:
    """Delete the unfinished runs of a folder on this machine, whose hash is returned, for the tag of its next run."""
    sender = hashlib.sha256(f"{socket.gethostname()}:{folder.resolve()}".encode()).hexdigest()[:16]
    for unfinished in _find_runs(client, compression):
        if unfinished.info.status != "FINISHED" and unfinished.data.tags.get(SENDER_TAG) == sender:
            client.delete_run(unfinished.info.run_id)
    return sender


def create_run(client: "MlflowClient", record: RunRecord, folder: Path) -> str:
    """Create the run of a record with its metrics and artifacts; returns its id.

    Unfinished runs of the same sender are deleted first. If another machine finished a run meanwhile, that one remains.
    """
    from mlflow.entities import Metric, Param

    tags = {SENDER_TAG: delete_unfinished(client, record.compression, folder), **record.tags}
    run = client.create_run(
        find_experiment(client, EXPERIMENT),
        start_time=record.finished_ms if record.started_ms is None else record.started_ms,
        tags=tags,
        run_name=record.run_name,
    )
    run_id = str(run.info.run_id)
    note = "\n\n".join(filter(None, [record.description, show_picture(run_id, folder / "reports")]))
    client.set_tag(run_id, "mlflow.note.content", note)
    _log_datasets(client, run_id, record.datasets)
    client.log_batch(run_id, params=[Param(key, value) for key, value in record.params.items()])
    metrics = [Metric(key, value, record.finished_ms, step) for key, step, value in record.values]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH])
    client.log_artifacts(run_id, str(folder / "reports"), "reports")
    if first := find_run(client, record.compression):  # of another machine, which may have registered it by now
        client.delete_run(run_id)
        return first
    client.set_terminated(run_id, "FINISHED", record.finished_ms)
    finished = _find_finished_runs(client, record.compression)
    for other in finished[1:]:
        client.delete_run(other.info.run_id)
    return str((finished or [run])[0].info.run_id)


def _log_datasets(client: "MlflowClient", run_id: str, datasets: Sequence[DatasetRecord]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = [
        DatasetInput(
            Dataset(
                name=it.name,
                digest=it.digest,
                source_type=it.source["source"],
                source=json.dumps(it.source),
                profile=json.dumps({"num_images": it.num_images}),
            ),
            [InputTag("mlflow.data.context", it.context)],
        )
        for it in datasets
    ]
    if inputs:
        client.log_inputs(run_id, inputs)
