"""Without MLFLOW_TRACKING_URI, all that MLflow writes lies in the current folder, however its path is spelled."""

import os
import stat
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from flows.tasks.database import ADDRESSES, create_database
from flows.workspaces.repository import Repository
from stages.runtime.errors import InputError
from stages.tracking.mlflow_client import connect, find_experiment, sqlite_file
from stages.tracking.recording import save_record
from stages.tracking.runs import RunRecord

PRIVATE = {
    "mlflow.db": 0o600,
    "mlruns": 0o700,
    "home/prefect": 0o700,
    "home/prefect/prefect.db": 0o600,
    "unsent": 0o700,
    ".espalier": 0o700,
}
"""What is written -> its permissions."""


@pytest.mark.parametrize("name", ["space ü %41 #x 'q'", "why? ü %41 #x"])
def test_the_default_database_lies_in_the_project(tmp_path, monkeypatch, name):
    """MLflow's own default writes to another folder, whose name is percent-encoded."""
    project = tmp_path / name
    project.mkdir()
    monkeypatch.chdir(project)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # restored after the test
    client = connect()
    run = client.create_run(find_experiment(client, "espalier")).info.run_id
    (tmp_path / "note.txt").write_text("a note")
    client.log_artifact(run, str(tmp_path / "note.txt"))

    if "?" not in name:
        assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{project}/mlflow.db"
    assert sqlite_file() == project / "mlflow.db"
    assert {path.name for path in tmp_path.iterdir()} == {name, "note.txt"}
    assert (project / "mlflow.db").is_file()
    assert [path.name for path in project.rglob("note.txt")] == ["note.txt"]


@pytest.mark.parametrize(("exists", "given_"), [(True, ""), (False, ""), (False, "sqlite:///mlflow.db")])
def test_all_commands_share_the_registry_of_a_home(tmp_path, monkeypatch, exists, given_):
    """With ESPALIER_HOME, a command in a checkout and a run in a workspace find the same database."""
    home, addresses = tmp_path / "a home", []
    if exists:
        home.mkdir()
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("ESPALIER_HOME", str(home))
    monkeypatch.delenv("ESPALIER_REPOSITORY", raising=False)
    for checkout, ask in (("one", connect), ("other", connect), ("one", Repository.find)):
        monkeypatch.chdir(tmp_path / checkout)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given_)
        ask()
        addresses.append(os.environ["MLFLOW_TRACKING_URI"])

    assert addresses == [f"sqlite:///{home}/mlflow.db"] * 3
    assert not [path for path in tmp_path.glob("o*/*") if "mlflow" in path.name]
    assert exists or stat.S_IMODE(home.stat().st_mode) == 0o700


def test_all_commands_share_the_registry_of_a_repository(tmp_path, monkeypatch):
    """Runs are cloned from one folder and record there; a command in another one finds them."""
    for name in ("repository", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("ESPALIER_REPOSITORY", str(tmp_path / "repository"))
    monkeypatch.delenv("ESPALIER_HOME", raising=False)
    addresses = []
    for ask in (connect, Repository.find):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
        ask()
        addresses.append(os.environ["MLFLOW_TRACKING_URI"])

    assert addresses == [f"sqlite:///{tmp_path}/repository/mlflow.db"] * 2
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("ask", [connect, Repository.find])
def test_a_repository_that_is_missing_is_not_replaced_by_the_current_folder(tmp_path, monkeypatch, ask):
    """Its registry would be another one; with ESPALIER_HOME it is found without the repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("ESPALIER_REPOSITORY", str(tmp_path / "moved"))
    monkeypatch.delenv("ESPALIER_HOME", raising=False)
    with pytest.raises(InputError, match="moved, no folder here; correct it, or set ESPALIER_HOME to a folder"):
        ask()

    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("ESPALIER_HOME", str(tmp_path / "home"))
    ask()
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/home/mlflow.db"


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("sqlite:////var/it.db?timeout=30", "/var/it.db"),
        ("sqlite:///file:/var/why%3F.db?uri=true&timeout=30", "/var/why?.db"),
        ("sqlite:///:memory:", None),
        ("postgresql://host/it.db", None),
    ],
)
def test_options_do_not_hide_the_file_of_an_address(monkeypatch, address, path):
    """Its lock and its permissions depend on the path alone."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert sqlite_file() == (path and Path(path))


def test_only_the_owner_may_read_what_is_recorded(tmp_path, monkeypatch):
    """The default database, its artifacts, Prefect's database, records that wait, and the folder of workspaces."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home" / "prefect"))
    monkeypatch.delenv("ESPALIER_HOME", raising=False)
    for variable in (*ADDRESSES, "ESPALIER_REPOSITORY"):
        monkeypatch.delenv(variable, raising=False)
    previous = os.umask(0o022)
    try:
        find_experiment(connect(), "espalier")
        create_database()
        record = RunRecord(compression="a" * 64, run_name="x", finished_ms=0, params={}, tags={}, values=[])
        (tmp_path / "reports").mkdir()
        save_record(record, tmp_path / "reports", tmp_path / "unsent")
        Repository.find()
    finally:
        os.umask(previous)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in PRIVATE}

    assert modes == PRIVATE


def test_a_database_that_another_process_makes_is_waited_for(tmp_path, monkeypatch):
    """Its tables are made one after the other; whoever opens it meanwhile would make them, too, and fail."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    connect()
    begun, connected = threading.Event(), threading.Event()
    with FileLock(f"{tmp_path}/mlflow.db.lock"):
        thread = threading.Thread(target=lambda: (begun.set(), connect(), connected.set()))
        thread.start()
        assert begun.wait(60)
        waited = not connected.wait(0.5)
    thread.join(60)

    assert waited
    assert connected.is_set()


def test_a_lock_that_cannot_be_opened_keeps_nobody_out(tmp_path, monkeypatch):
    """Whoever may use the database need not be whoever made its lock file; root opens every file, but no folder."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    connect()
    (tmp_path / "mlflow.db.lock").unlink(missing_ok=True)
    (tmp_path / "mlflow.db.lock").mkdir()

    assert connect().search_experiments()
