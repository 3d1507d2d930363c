"""A training in progress -> an MLflow run with its curve and samples; a slow server does not delay the training."""

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import thread as executors
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.data.grid import write_grid
from stages.runtime.errors import first_line, warn
from stages.tracking.mlflow_client import connect, open_run, set_environment

EXPERIMENT = "espalier-live"
"""Apart from the experiment of finished compressions, which does not depend on it."""
TAG = "espalier.run"
WAIT_S = 20.0
"""Longest time that the end of a training waits for the server."""
Row = tuple[int, Mapping[str, float], NDArray[np.uint8] | None]
"""Step, metrics and samples."""


class LiveRun:
    """The MLflow run of one training, which a resumed training continues; does nothing without MLFLOW_TRACKING_URI.

    MLflow's own asynchronous logging is no substitute: it waits without limit for its queue at exit, and creates runs
    and logs artifacts synchronously. A daemon thread, unlike a ThreadPoolExecutor's, does not delay the exit; threads
    that the clients of S3 and others start in it are let go at the exit.

    Args:
        run: Fingerprint of the training.
        params: Params to log.

    Raises:
        InputError: MLFLOW_TRACKING_URI is not an address, or another variable of MLflow's client is wrong.
    """

    def __init__(self, run: str, params: Mapping[str, Any]) -> None:
        self.run, self.params, self.has_warned = run, params, False
        self.queue: SimpleQueue[Row | str] = SimpleQueue()
        self.thread = threading.Thread(target=self._send_all, name="live", daemon=True)
        if os.environ.get("MLFLOW_TRACKING_URI"):
            set_environment()  # a wrong address ends the training before its first step, not its log
            threading._register_atexit(_let_go)  # type: ignore[attr-defined]  # noqa: SLF001  # atexit's would come too late
            self.thread.start()

    def log(self, step: int, values: Mapping[str, float | None], samples: NDArray[np.uint8] | None = None) -> None:
        """Log metrics of a step, and samples [N, C, H, W], in the background."""
        if self.thread.is_alive():
            metrics = {key: value for key, value in values.items() if value is not None}
            self.queue.put((step, metrics, samples))

    def close(self, status: str) -> None:
        """End the run with a status of MLflow: FINISHED, FAILED or KILLED."""
        if self.thread.is_alive():
            self.queue.put(status)
            self.thread.join(WAIT_S)
            if self.thread.is_alive():
                self._warn(f"no answer within {WAIT_S:g} s")

    def _send_all(self) -> None:
        try:
            client = connect()
            run_id = open_run(client, EXPERIMENT, (TAG, self.run), self.run[:8], self.params)
            with _watching_machine(run_id) as watch:
                while not isinstance(row := self.queue.get(), str):
                    _send(client, run_id, *row)
                    watch()
            client.set_terminated(run_id, row)
        except Exception as error:  # noqa: BLE001  # whatever a server or MLflow raises
            self._warn(first_line(error))

    def _warn(self, reason: str) -> None:
        if not self.has_warned:
            self.has_warned = True
            warn(f"MLflow does not show this training ({reason}); the training continues without it")


@contextmanager
def _watching_machine(run_id: str) -> Iterator[Callable[[], None]]:
    """Log use of CPU, memory, disk, network and GPUs every ten seconds, as MLflow's system metrics.

    Yields what begins to log again if MLflow's monitor has ended, which it does at the first request that fails.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitors: list[SystemMetricsMonitor] = []

    def watch() -> None:
        """Start a monitor unless one is running."""
        thread = monitors[-1]._process if monitors else None  # noqa: SLF001  # there is no public way
        if thread is None or not thread.is_alive():
            for ended in monitors:
                ended.finish()  # type: ignore[no-untyped-call]  # sends what it had collected
            monitors[:] = [SystemMetricsMonitor(run_id, resume_logging=True)]  # type: ignore[no-untyped-call]
            monitors[0].start()  # type: ignore[no-untyped-call]

    watch()
    try:
        yield watch
    finally:
        monitors[0].finish()  # type: ignore[no-untyped-call]


def _let_go() -> None:
    """Keep the interpreter from waiting for executors' threads that a daemon thread started, and so are daemons."""
    waited_for: Any = executors._threads_queues  # noqa: SLF001  # there is no public way
    for thread in list(waited_for):
        if thread.daemon:
            del waited_for[thread]


def _send(
    client: Any,  # noqa: ANN401  # MLflow is imported in `connect`
    run_id: str,
    step: int,
    metrics: Mapping[str, float],
    samples: NDArray[np.uint8] | None,
) -> None:
    """Log one row."""
    for key, value in metrics.items():
        client.log_metric(run_id, key, value, step=step)
    if samples is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"step-{step:08d}.png"
            write_grid(samples, path, columns=len(samples))
            client.log_artifact(run_id, str(path), "samples")
