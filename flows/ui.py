"""The store in MLFLOW_TRACKING_URI -> the address of the page that shows its runs, opened in a browser."""

import os
import socket
import subprocess
import sys
import time
import webbrowser
from typing import TYPE_CHECKING

import click

from stages.runtime import supervisor
from stages.runtime.errors import InputError, UnavailableError, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient

HOST = "127.0.0.1"
PORT = 5000
START_S = 120.0
"""Longest wait for the first answer of a server that this command started."""


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), default=PORT, show_default=True, help="Port of the page.")
@click.option("--open/--no-open", "to_open", default=True, help="Whether to open the page in a browser.")
def ui(port: int, *, to_open: bool) -> None:
    """Show the recorded runs in MLflow's page: start it for a store on this machine, or name the server's address."""
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    page = _runs_page()
    if server.startswith("http"):
        _show(f"{without_password(server).rstrip('/')}{page}", to_open=to_open)
        return
    _check_free(port)
    with _start(port) as process:  # it ends with this process, however that ends
        try:
            _wait(port, process)
            _show(f"http://{HOST}:{port}{page}", to_open=to_open)
            click.echo("Ctrl-C ends it")
            process.wait()
        except KeyboardInterrupt:
            click.echo("MLflow's page has ended")
        finally:
            _stop(process)


def _runs_page() -> str:
    """Return the part of the address after the server's: MLflow opens on another page, on which no run is.

    Raises:
        InputError: The store has no runs.
        UnavailableError: The server does not answer.
    """
    from stages.tracking.mlflow_client import connect, errors, sqlite_file

    with errors("does not list the runs"):
        file = sqlite_file()
        if file and not file.exists():
            raise InputError(f"{file} does not exist: no run was recorded here yet; record one: espalier run")
        experiment = _find_experiment(connect())
    if experiment is None:
        raise InputError("the store has no runs yet; record one: espalier run")
    return f"/#/experiments/{experiment}/runs?workflowType=machine_learning"


def _find_experiment(client: "MlflowClient") -> str | None:
    """Find the experiment of finished compressions, or else that of trainings in progress, if it has runs."""
    from stages.tracking.live import EXPERIMENT as LIVE
    from stages.tracking.runs import EXPERIMENT

    for name in (EXPERIMENT, LIVE):
        found = client.get_experiment_by_name(name)
        if found and client.search_runs([found.experiment_id], max_results=1):
            return str(found.experiment_id)
    return None


def _check_free(port: int) -> None:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((HOST, port))
        except OSError:
            advice = f"give another one: espalier ui --port {port + 1}"
            raise InputError(f"port {port} of {HOST} is in use; {advice}") from None


def _start(port: int) -> "subprocess.Popen[bytes]":
    """Start MLflow's server on loopback below a supervisor; its files are closed to other users."""
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": os.environ["MLFLOW_TRACKING_URI"]}
    options = ["--host", HOST, "--port", str(port)]
    return subprocess.Popen(
        [sys.executable, "-I", supervisor.__file__, sys.executable, "-m", "mlflow", "ui", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,  # the store's address may hold a password, which an argument would show to every user
        start_new_session=True,
        umask=0o077,
    )


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Close the supervisor's standard input, whereupon it ends the server."""
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def _wait(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as trial:
            if trial.connect_ex((HOST, port)) == 0:
                return
        time.sleep(0.2)
    reason = f"it ended with exit code {process.returncode}" if process.poll() is not None else "it does not answer"
    raise UnavailableError(f"MLflow's page did not start: {reason}; try another port with --port")


def _show(address: str, *, to_open: bool) -> None:
    click.echo(address)
    if to_open:
        webbrowser.open(address)
