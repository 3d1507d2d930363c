"""A stage ends with the DVC that started it, and with nobody else."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

import psutil
import pytest

from tests.orchestra import is_alive, until
from tests.records import STAGES
from tests.servers import ROOT

SCRIPT = """
import os, pathlib, time
from stages.runtime.parent import end_with_dvc
from stages.storage.files import writing

end_with_dvc()
with writing(pathlib.Path("out")):
    pathlib.Path("up").write_text(str(os.getpid()))
    try:
        time.sleep(120)
    finally:
        time.sleep(1)  # as if there were many files
"""
DVC = """
import os, signal, subprocess, sys

signal.signal(signal.SIGHUP, signal.SIG_DFL)
subprocess.run([*sys.argv[2:], "-c", sys.argv[1]], env={**os.environ, %s})
"""
"""Starts a command as DVC does: a shell in its own session, with DVC_STAGE for the command alone. SIGHUP ends it, also
where the tests run under nohup."""
WRAPPER = '#!/bin/sh\n/bin/sh "$@"\nexit $?\n'


@pytest.fixture
def start(tmp_path):
    """Start a command below a parent; yields a function that returns the parent and the command's own process."""
    (tmp_path / "stage.py").write_text(SCRIPT)
    (tmp_path / "shell").write_text(WRAPPER)
    (tmp_path / "shell").chmod(0o755)
    started = []

    def begin(shell, command="{python} stage.py", variable="'DVC_STAGE': 'finetune'"):
        line = command.format(python=sys.executable)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        arguments = [sys.executable, "-c", DVC % variable, line, shell]
        parent = subprocess.Popen(arguments, cwd=tmp_path, env=environment, start_new_session=True)
        started.append(parent)
        up = tmp_path / "up"
        assert until(lambda: up.exists() and up.read_text(), 30)
        stage = psutil.Process(int(up.read_text()))
        started.append(stage)
        return parent, stage

    yield begin
    for process in started:
        with suppress(psutil.Error):
            process.kill()
        if isinstance(process, subprocess.Popen):
            process.wait()


@pytest.mark.parametrize("with_parent", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stage_that_is_told_to_end_leaves_no_temporary_folder(start, tmp_path, number, with_parent):
    """Alone, by a user; or with all processes of a flow that is cancelled or takes too long."""
    parent, stage = start("/bin/sh")
    assert list(tmp_path.glob(".out.*"))
    stage.send_signal(number)
    if with_parent:
        parent.kill()

    assert until(lambda: not is_alive(stage), 30)
    parent.wait(30)
    assert not list(tmp_path.glob(".out.*"))


def test_a_process_of_a_launcher_ends_at_once(start):
    """The launcher ends it after another one has failed, whose exit code counts."""
    parent, stage = start("/bin/sh", variable="'DVC_STAGE': 'finetune', 'LOCAL_RANK': '1'")
    stage.send_signal(signal.SIGTERM)

    assert parent.wait(30) == 0
    assert not is_alive(stage)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("shell", ["/bin/sh", "./shell"])
def test_a_stage_ends_with_dvc(start, shell, number):
    """Whether the shell is replaced by the stage or stays between; DVC may be a zombie that nobody waits for."""
    parent, stage = start(shell)
    parent.send_signal(number)

    assert until(lambda: not is_alive(stage), 10)


def test_a_stage_ends_with_the_shell_between(start):
    """DVC would take it as failed and go on while it runs."""
    _, stage = start("./shell")
    stage.parent().kill()

    assert until(lambda: not is_alive(stage), 10)


def test_without_dvc_a_stage_outlives_its_parent(start):
    """A user's nohup or & means that it goes on."""
    parent, stage = start("./shell", variable="")
    for process in [*psutil.Process(parent.pid).children()]:
        process.kill()
    parent.kill()
    parent.wait()

    assert not until(lambda: not is_alive(stage), 1.5)


def test_a_stage_that_starts_after_the_end_of_dvc_ends_at_once(start, tmp_path):
    """Its parent is then the process that takes orphans; it must not be watched in place of DVC."""
    line = "echo $$ > up; while kill -0 $PPID 2>/dev/null; do sleep 0.05; done; {python} stage.py; echo $? > code"
    parent, _ = start("/bin/sh", command=line)
    parent.kill()
    parent.wait()

    code = tmp_path / "code"
    assert until(lambda: code.exists() and code.read_text(), 30) == f"{128 + signal.SIGTERM}\n"


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_watches(stage):
    """A process of another session is not the DVC of this stage, so each ends before it reads its options."""
    result = subprocess.run(
        [sys.executable, "-m", f"stages.{stage}"],
        cwd=ROOT,
        env={**os.environ, "DVC_STAGE": stage},
        start_new_session=True,
        check=False,
    )

    assert result.returncode == 128 + signal.SIGTERM
