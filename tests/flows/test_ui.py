"""`espalier ui`: the page on which the runs are, whatever MLflow opens on."""

import contextlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from flows import ui as module
from flows.ui import ui
from stages.tracking.mlflow_client import connect, find_experiment
from stages.tracking.runs import EXPERIMENT
from tests.swift import free_ports


@pytest.fixture
def opened(monkeypatch):
    """Addresses that a browser was to open."""
    found = []
    monkeypatch.setattr(module.webbrowser, "open", found.append)
    return found


@pytest.fixture
def experiment(mlflow_database):  # noqa: ARG001  # in a variable of the environment
    """The experiment of a store with one run."""
    client = connect()
    found = find_experiment(client, EXPERIMENT)
    client.create_run(found)
    return found


@pytest.mark.parametrize("options", [[], ["--no-open"]])
def test_the_address_leads_to_the_runs(experiment, opened, monkeypatch, options):
    """It is printed, and opened unless that is not wanted."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(module, "_check_free", lambda _port: None)
        command = [sys.executable, "-c", ""]  # MLflow's own server is started by the test in Chromium
        monkeypatch.setattr(module, "_start", lambda _port: subprocess.Popen(command, stdin=subprocess.PIPE))
        monkeypatch.setattr(module, "_wait", lambda _port, _process: None)
        port = server.getsockname()[1]
        result = CliRunner().invoke(ui, ["--port", str(port), *options])
    address = f"http://127.0.0.1:{port}/#/experiments/{experiment}/runs?workflowType=machine_learning"

    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [address, "Ctrl-C ends it"]
    assert opened == ([] if options else [address])


@pytest.fixture
def umask():
    """The permissions that this process withholds during a test, and not after it."""
    previous = os.umask(0o022)
    yield 0o022
    os.umask(previous)


def command_lines_and_masks(pid):
    """Read those of a process and of all that it started; one that ends meanwhile, as a zombie does, has neither.

    A mask is the permissions that a process withholds from the files that it makes.
    """
    found = []
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.Error, OSError):
            mask = re.search(r"^Umask:\s+(\d+)$", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
            found.append((" ".join(process.cmdline()), mask and mask[1]))
    return zip(*found, strict=True)


def test_the_stores_address_is_in_no_command_line(mlflow_database, umask):
    """It may hold a password, and every user of the machine can list the arguments of all processes.

    Files of the server are closed to other users, and those of this process are made as before.
    """
    (port,) = free_ports(1)
    with module._start(port) as process:
        module._wait(port, process)
        lines, masks = command_lines_and_masks(process.pid)
        answer = MlflowClient(f"http://127.0.0.1:{port}").get_experiment_by_name("Default")
        module._stop(process)

    assert answer.name == "Default"
    assert any("uvicorn" in line for line in lines)
    assert [line for line in lines if mlflow_database in line] == []
    assert set(masks) == {"0077"}
    assert os.umask(umask) == umask


def test_a_store_without_runs_is_one_line(mlflow_database, opened):  # noqa: ARG001
    """No server is started for it."""
    result = CliRunner().invoke(ui, [])

    assert result.exit_code == 1
    assert result.stderr.splitlines() == ["Error: the store has no runs yet; record one: espalier run"]
    assert not opened


def test_a_folder_without_a_store_is_one_line(tmp_path, monkeypatch):
    """It is not made by looking."""
    folder = tmp_path / "a folder with 100 %"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    result = CliRunner().invoke(ui, [])

    assert result.exit_code == 1
    found = f"{folder}/mlflow.db does not exist: no run was recorded here yet"
    assert result.stderr == f"Error: {found}; record one: espalier run\n"
    assert not list(folder.iterdir())


def test_a_port_in_use_is_one_line(experiment, opened):
    """The line says how to take another."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = CliRunner().invoke(ui, ["--port", str(port)])

    assert experiment
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"Error: port {port} of 127.0.0.1 is in use; give another one: espalier ui --port {port + 1}"
    ]
    assert not opened
