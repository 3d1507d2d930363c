"""The environment -> the MLflow server that it names, set up to be quick to fail and to report to nobody."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stages.runtime import telemetry
from stages.runtime.errors import InputError, UnavailableError, first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Defaults that the environment may overrule."""
MODEL = "artifacts/model"
"""Folder of a version in the registry: what diffusers opens."""
NETWORK = ("requests.", "urllib3.")
"""Modules whose errors are those of a network."""


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


def download_model(uri: str, folder: Path) -> Path:
    """Download the diffusers folder of a version, models:/NAME/VERSION, below `folder`.

    Raises:
        InputError: There is no such version, it holds no model, or the server is away.
    """
    with errors(f"does not give {uri}"):
        connect()
        import mlflow

        return Path(mlflow.artifacts.download_artifacts(artifact_uri=f"{uri}/{MODEL}", dst_path=str(folder)))


@contextmanager
def errors(what: str) -> Iterator[None]:
    """Turn what MLflow raises into one line that holds no password."""
    prepare()
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  # a server may answer anything, and MLflow stumble over it anywhere
        kind = UnavailableError if _is_of_the_network(error) else InputError
        raise kind(f"the MLflow registry {what}: {first_line(error)}") from None


def _is_of_the_network(error: BaseException | None) -> bool:
    """Say whether an error is, or came of, a server that does not answer."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith(NETWORK):
            return True
        error = error.__cause__ or error.__context__
    return False
