"""A training in progress -> an MLflow run that people can watch; a server that is slow or away holds up no training."""

import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from stages.data.grid import write_grid
from stages.runtime.errors import first_line
from stages.tracking.mlflow_client import connect, find_experiment

EXPERIMENT = "espalier-live"
"""Beside the record of finished compressions, which is complete without it."""
TAG = "espalier.run"
PATIENCE_S = 20.0
"""That the end of a training waits for the last lines to arrive."""


class LiveRun:
    """The MLflow run of one training, which goes on in it after a stop; silent where no MLFLOW_TRACKING_URI is set.

    Args:
        run: Fingerprint of the training.
        params: What to tell of it.
    """

    def __init__(self, run: str, params: Mapping[str, Any]) -> None:
        self.run, self.params = run, params
        self.is_on = bool(os.environ.get("MLFLOW_TRACKING_URI"))
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="live")
        self.id = ""

    def log(self, step: int, values: Mapping[str, float | None], pictures: NDArray[np.uint8] | None = None) -> None:
        """Send numbers of a step, and pictures [N, C, H, W], in the background."""
        if self.is_on:
            self.pool.submit(
                self._send, step, {key: value for key, value in values.items() if value is not None}, pictures
            )

    def close(self, status: str) -> None:
        """Say how it ended, in MLflow's words: FINISHED, FAILED or KILLED."""
        if self.is_on:
            wait([self.pool.submit(self._end, status)], timeout=PATIENCE_S)
        self.pool.shutdown(wait=False, cancel_futures=True)

    def _send(self, step: int, values: Mapping[str, float], pictures: NDArray[np.uint8] | None) -> None:
        try:
            client = self._open()
            for key, value in values.items():
                client.log_metric(self.id, key, value, step=step)
            if pictures is not None:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / f"step-{step:08d}.png"
                    write_grid(pictures, path, columns=len(pictures))
                    client.log_artifact(self.id, str(path), "samples")
        except Exception as error:  # noqa: BLE001  # any fault of a server
            self._give_up(error)

    def _open(self) -> Any:  # noqa: ANN401  # MLflow is not imported before it is needed
        """Find the run of this training, or begin it."""
        if not self.is_on:
            raise ConnectionError("it was away before")
        client = connect()
        if not self.id:
            experiment = find_experiment(client, EXPERIMENT)
            found = client.search_runs([experiment], f"tags.`{TAG}` = '{self.run}'", max_results=1)
            started = found[0] if found else client.create_run(experiment, tags={TAG: self.run}, run_name=self.run[:8])
            self.id = str(started.info.run_id)
            client.update_run(self.id, status="RUNNING")
            for key, value in self.params.items() if not found else ():
                client.log_param(self.id, key, value)
        return client

    def _end(self, status: str) -> None:
        try:
            self._open().set_terminated(self.id, status)
        except Exception as error:  # noqa: BLE001  # any fault of a server
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if self.is_on:
            self.is_on = False
            click.echo(
                f"Warning: MLflow does not show this training ({first_line(error)}); it goes on unseen", err=True
            )
