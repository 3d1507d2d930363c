"""Images that are being drawn -> an MLflow run of the job, which a later call of the same job continues."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from stages.runtime.errors import first_line, warn
from stages.tracking.mlflow_client import connect, open_run, set_environment

EXPERIMENT = "espalier-draw"
TAG = "espalier.draw"
"""Tag of a run: the hash of the job."""


class DrawRun:
    """The MLflow run of a job; does nothing without MLFLOW_TRACKING_URI, and a server that fails costs a warning.

    Args:
        job: Hash of the job.
        name: Name of the run.
        params: Params to log.

    Raises:
        InputError: MLFLOW_TRACKING_URI is not an address.
    """

    def __init__(self, job: str, name: str, params: Mapping[str, Any]) -> None:
        self.job, self.name, self.params = job, name, params
        self.is_on, self.run_id = bool(os.environ.get("MLFLOW_TRACKING_URI")), ""
        if self.is_on:
            set_environment()

    def log(self, num_images: int, images_per_s: float) -> None:
        """Log how many images of the job are finished, and how fast this call draws."""
        self._send(lambda client: self._log(client, num_images, images_per_s))

    def close(self, status: str, manifest: bytes | None = None) -> None:
        """End the run with a status of MLflow; the manifest, if the job is finished, becomes an artifact."""

        def end(client: Any) -> None:  # noqa: ANN401  # MLflow is imported in `connect`
            """Send the manifest, if there is one, and the status."""
            if manifest is not None:
                client.log_text(self.run_id, manifest.decode(), "manifest.json")
            client.set_terminated(self.run_id, status)

        self._send(end)

    def _log(self, client: Any, num_images: int, images_per_s: float) -> None:  # noqa: ANN401
        client.log_metric(self.run_id, "images", num_images, step=num_images)
        client.log_metric(self.run_id, "images_per_s", images_per_s, step=num_images)

    def _send(self, action: Callable[[Any], None]) -> None:
        if not self.is_on:
            return
        try:
            client = connect()
            self.run_id = self.run_id or open_run(client, EXPERIMENT, (TAG, self.job), self.name, self.params)
            action(client)
        except Exception as error:  # noqa: BLE001  # whatever a server or MLflow raises
            self.is_on = False
            warn(f"MLflow does not show this job ({first_line(error)}); drawing continues without it")
