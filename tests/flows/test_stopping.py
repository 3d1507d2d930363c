"""A flow that a signal stops: Prefect knows, and the terminal gets one line."""

import re
import signal
import subprocess
import sys

import pytest

from tests.orchestra import bare_environment, until
from tests.servers import ROOT

FLOW = """
import pathlib, time
from flows.tasks.temporary_server import ensure_server

ensure_server()
from prefect import flow, task

@task
def work():
    pathlib.Path("up").touch()
    time.sleep(120)

@flow(on_crashed=[lambda flow, run, state: pathlib.Path("crashed").touch()])
def wait():
    work()

wait(return_state=True)
"""


CELLS = """
import pathlib
from flows.tasks.temporary_server import ensure_server

ensure_server()
from prefect import flow, task
from flows.tasks.errors import fail_on_input_error
from flows.tasks.runners import open_runner
from flows.workspaces.commands import run

@task
@fail_on_input_error
def work():
    run(["sh", "-c", "touch up; sleep 300"], print)

@flow(on_crashed=[lambda flow, run, state: pathlib.Path("crashed").touch()])
def wait():
    with open_runner("threads", 1) as (runner, _):
        runner.submit(work, {}).wait()

wait(return_state=True)
"""


@pytest.mark.e2e
@pytest.mark.parametrize("script", [FLOW, CELLS], ids=["flow", "cells on threads"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_flow_says_so_in_one_line(tmp_path, number, script):
    """Without a traceback; its run is Crashed, so that somebody is notified."""
    environment = bare_environment(PYTHONPATH=str(ROOT), PREFECT_HOME=str(tmp_path / "prefect"))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment, **pipes)
    try:
        assert until((tmp_path / "up").exists, 400)
        process.send_signal(number)
        said = process.communicate(timeout=60)[0]
    finally:
        process.kill()

    assert process.returncode == 128 + number, said
    assert said.count("Stopped by SIG") == 1, said
    assert not re.search("Traceback|Aborted", said), said
    assert (tmp_path / "crashed").exists()
