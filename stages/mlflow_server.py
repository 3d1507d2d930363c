"""The environment -> the MLflow server that it names, set up to be quick to fail and to report to nobody."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from stages import telemetry

if TYPE_CHECKING:
    from mlflow import MlflowClient

SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Defaults that the environment may overrule."""


def connect() -> "MlflowClient":
    """Open the tracking server that MLFLOW_TRACKING_URI names; without one, a file here."""
    prepare()
    from filelock import FileLock
    from mlflow import MlflowClient

    file = database()
    if file is None or file.exists():
        return MlflowClient()
    with FileLock(f"{file}.lock"):  # two processes at once would both make its tables
        return MlflowClient()


def prepare() -> None:
    """Set what MLflow reads from the environment as it is imported."""
    telemetry.switch_off()
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)


def find_experiment(client: "MlflowClient", name: str) -> str:
    """Find an experiment, or make it: its id."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            file = database()
            beside = (file.parent / "mlruns").as_uri() if file else None  # else the server knows
            return str(client.create_experiment(name, artifact_location=beside))
        except MlflowException:  # another process made it between the two calls
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def database() -> Path | None:
    """Give the file that the record is, where it is a file whose place does not depend on where we are."""
    found = re.fullmatch(r"sqlite:///(/.+)", os.environ.get("MLFLOW_TRACKING_URI", ""))
    return Path(found[1]) if found else None
