"""Environment variables -> an MLflow client that fails fast and sends no telemetry."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from stages.runtime import telemetry
from stages.runtime.environment import HOME_VARIABLE, bypass_proxies, check_tracking
from stages.runtime.errors import InputError, UnavailableError, first_line
from stages.runtime.network import is_outage
from stages.runtime.origin import records_folder
from stages.storage.files import make_private

if TYPE_CHECKING:
    from mlflow import MlflowClient

SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Defaults; variables of the environment take precedence."""
MODEL = "artifacts/model"
"""Folder of a registered version that diffusers loads."""


def connect() -> "MlflowClient":
    """Return a client of the tracking server in MLFLOW_TRACKING_URI; by default of mlflow.db.

    Raises:
        InputError: As of set_environment.
    """
    set_environment()
    from filelock import FileLock
    from mlflow import MlflowClient

    file = sqlite_file()
    if file is None or not os.access(file.parent, os.W_OK):
        return MlflowClient()
    lock = FileLock(f"{file}.lock")  # two processes at once would both create or migrate its tables
    with suppress(OSError):  # the lock file is another user's
        lock.acquire()
    try:
        with suppress(OSError):
            file.touch(mode=0o600)  # MLflow would make one that others can read
        return MlflowClient()
    finally:
        lock.release()


def set_environment() -> None:
    """Check the address of the server, and set what MLflow reads.

    The default is mlflow.db. It and any other relative file lie in `records_folder`, as for runs in workspaces.

    Raises:
        InputError: MLFLOW_TRACKING_URI is not an address, or names an SQLite file in a folder that does not exist, or
            ESPALIER_HOME cannot be made; or as of records_folder.
    """
    telemetry.switch_off()
    bypass_proxies()
    check_tracking()
    os.environ["MLFLOW_TRACKING_URI"] = absolute_address()
    file, home = sqlite_file(), os.environ.get(HOME_VARIABLE)
    if file and home and file.parent == Path(home).resolve():
        _make_home(file.parent)
    if file and not file.parent.is_dir():  # MLflow would create the folder of a mistyped address
        found = f"MLFLOW_TRACKING_URI names a file in {file.parent}, which is no folder"
        raise InputError(f"{found}; create it, or correct the address")
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)


def _make_home(home: Path) -> None:
    if home.exists() and not home.is_dir():
        raise InputError(f"{HOME_VARIABLE} is {home}, which is no folder; correct it")
    if not home.exists():
        make_private(home)


def find_experiment(client: "MlflowClient", name: str) -> str:
    """Find or create an experiment and return its id."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            file = sqlite_file()
            artifacts = None  # a server has its own default
            if file:
                make_private(file.parent / "mlruns")
                artifacts = (file.parent / "mlruns").as_uri()
            return str(client.create_experiment(name, artifact_location=artifacts))
        except MlflowException:  # another process created it between the two calls
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def open_run(
    client: "MlflowClient", experiment: str, tag: tuple[str, str], name: str, params: Mapping[str, Any]
) -> str:
    """Find the run with a tag in an experiment, or create it with its params, and return its id; it is running then."""
    key, value = tag
    found_in = find_experiment(client, experiment)
    found = client.search_runs([found_in], f"tags.`{key}` = '{value}'", max_results=1)
    run = found[0] if found else client.create_run(found_in, tags={key: value}, run_name=name)
    run_id = str(run.info.run_id)
    client.update_run(run_id, status="RUNNING")
    for param, content in params.items() if not found else ():
        client.log_param(run_id, param, content)
    return run_id


def sqlite_file() -> Path | None:
    """Return the path of the SQLite file in MLFLOW_TRACKING_URI, if it is one."""
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    if found := re.fullmatch(r"sqlite:///file:(/[^?]+)\?.*", address):
        return Path(unquote(found[1]))
    found = re.fullmatch(r"sqlite:///(?!file:|:memory:)([^?]+)(\?.*)?", address)
    return Path(found[1]).absolute() if found else None


def absolute_address() -> str:
    """Return MLFLOW_TRACKING_URI, by default sqlite:///mlflow.db, with the absolute path of a relative SQLite file.

    MLflow would look for a relative file in the current folder, which is another one in each workspace.

    Raises:
        InputError: As of records_folder.
    """
    address = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    relative = re.fullmatch(r"sqlite:///(?!file:|:memory:)([^/?][^?]*)(?:\?(.*))?", address)
    if not relative:
        return address
    file, query = str(records_folder() / relative[1]), relative[2]
    if "?" in file:  # it would end the path
        return f"sqlite:///file:{quote(file)}?uri=true{f'&{query}' if query else ''}"
    return f"sqlite:///{file}{f'?{query}' if query else ''}"


def download_model(uri: str, folder: Path) -> Path:
    """Download the diffusers folder of a registered version, models:/NAME/VERSION, into `folder`.

    Raises:
        InputError: The version does not exist or holds no model.
        UnavailableError: The server does not answer.
    """
    with errors(f"does not give {uri}"):
        connect()
        import mlflow

        return Path(mlflow.artifacts.download_artifacts(artifact_uri=f"{uri}/{MODEL}", dst_path=str(folder)))


@contextmanager
def errors(what: str) -> Iterator[None]:
    """Turn any exception of MLflow into one line without passwords.

    Raises:
        UnavailableError: The server does not answer.
        InputError: MLflow raised any other exception.
    """
    set_environment()
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  # MLflow raises exceptions of any kind on unexpected answers
        kind = UnavailableError if is_outage(error) else InputError
        raise kind(f"the MLflow registry {what}: {first_line(error)}") from None
