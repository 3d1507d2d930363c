"""Commands: lines, exit codes and results as data; no process of a command outlives its caller."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from flows.tasks.stages import fail
from flows.workspaces import commands
from flows.workspaces.commands import StoppedError, allow_commands, pause, run, stop_commands
from tests.orchestra import MARK, descendants, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children in other sessions are followed on Linux")
TREE = """
import subprocess, time
subprocess.Popen(["sleep", "300"], start_new_session=True)
print("up", flush=True)
time.sleep(300)
"""


def discard(_line):
    """Take a line."""


def test_lines_and_code_come_through():
    """The lines of both streams arrive in order, without empty ones."""
    lines = []
    result = run(["sh", "-c", "echo one; echo; echo two >&2; exit 3"], lines.append)
    assert lines == ["one", "two"] == list(result.lines)
    assert (result.code, result.is_transient, result.timed_out) == (3, False, False)


@pytest.mark.parametrize(
    ("script", "code", "is_transient"),
    [
        ("exit 1", 1, False),
        ("exit 75", 75, True),
        ("kill -9 $$", 137, True),
        ("$SHELL -c 'exit 1'; exit 255", 1, False),
        ("$SHELL -c 'exit 75'; exit 255", 75, True),
        ("$SHELL -c 'kill -9 $$'; exit 255", 137, True),
        ("$SHELL -c true; exit 255", 255, False),
        ("echo 'ERROR: failed to pull: failed to run: y, exited with 75'; exit 255", 255, False),
    ],
)
def test_only_unavailable_servers_and_signals_are_retried(script, code, is_transient):
    """The exit code of a stage counts, not that of DVC, which is always 255; text of any kind does not."""
    result = run(["sh", "-c", script], discard)
    assert (result.exit_code, result.is_transient) == (code, is_transient)


@pytest.mark.parametrize("script", ["exit 3", "echo; exit 3", "kill -9 $$", "$SHELL -c 'exit 1'; exit 255"])
def test_a_command_that_said_nothing_fails_with_a_message(script):
    """Whatever ended it; a flow shows the message beside the exit code."""
    result = run(["sh", "-c", script], discard)
    state = fail(result, is_transient=result.is_transient)

    assert (result.lines, result.message) == ((), "it printed nothing")
    assert state.message == f"it printed nothing (exit code {result.exit_code})"


def test_a_stage_code_shows_that_dvc_ran_a_stage():
    """It is None where DVC ran no stage, and the code of the last command where a stage has several."""
    assert run(["echo", "Running stage 'prune':"], discard).stage_code is None
    assert run(["sh", "-c", "$SHELL -c true"], discard).stage_code == 0
    assert run(["sh", "-c", "$SHELL -c true; $SHELL -c 'exit 3'"], discard).stage_code == 3


def test_dvc_runs_a_stage_in_our_shell(tmp_path):
    """A real DVC: a stage that ran, one that was cached, and one that failed."""
    environment = {"DVC_NO_ANALYTICS": "1"}
    (tmp_path / "dvc.yaml").write_text(
        "stages:\n  good: {cmd: echo made > out, deps: [input], outs: [out]}\n  bad: {cmd: exit 75, outs: [other]}\n"
    )
    (tmp_path / "input").write_text("x")
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
        assert run(command, discard, folder=tmp_path, environment=environment).code == 0

    def reproduce(stage):
        return run(["dvc", "repro", "--single-item", stage], discard, folder=tmp_path, environment=environment)

    assert [(it.code, it.stage_code) for it in (reproduce("good"), reproduce("good"))] == [(0, 0), (0, None)]
    (tmp_path / "out").unlink()
    (tmp_path / "dvc.lock").unlink()
    assert reproduce("good").stage_code is None  # from DVC's run cache
    bad = reproduce("bad")
    assert (bad.code, bad.exit_code, bad.is_transient) == (255, 75, True)


ODD = "no MLflow run x: Error: give a; b\\nERROR: exited with (75)"


@pytest.mark.parametrize("error", ["InputError", "UnavailableError"])
def test_the_message_of_an_input_error_arrives_as_data(error):
    """Neither its own text nor other printed lines change it; line breaks are escaped."""
    code = f"""
import click
from stages.runtime.errors import {error}
@click.command()
def main():
    print("Error: not this; MLflow run 1")
    raise {error}("{ODD}")
main()
"""
    result = run([sys.executable, "-c", code], discard)
    assert result.message == ODD
    assert result.is_transient == (error == "UnavailableError")


def test_a_result_arrives_as_data():
    """The last written result counts; printed text that looks like a result has no effect."""
    code = """
from stages.runtime.result import write_result
write_result(mlflow_run="half")
write_result(mlflow_run="abc", new=True)
print("MLflow run other: recorded")
"""
    result = run([sys.executable, "-c", code], discard)
    assert result.found == {"mlflow_run": "abc", "new": True}
    assert run(["echo", "MLflow run other: recorded"], discard).found == {}


def test_progress_arrives_as_data():
    """The callback gets every change; a printed line of the same form has no effect."""
    code = """
import time
from stages.runtime.progress import track
print("odd 1/2, 3.0/s, 4 s left")
list(track(range(3), "a label 1/2, 3.0/s", 3))
time.sleep(0.5)
list(track(range(2), "second", 4, done=2))
"""
    found = []
    run([sys.executable, "-c", code], discard, on_progress=found.append)
    assert [(it["label"], it["done"], it["total"]) for it in found] == [("a label 1/2, 3.0/s", 3, 3), ("second", 4, 4)]
    assert all(it["rate_per_s"] > 0 and it["left_s"] == 0 for it in found)


def test_a_limit_ends_everything(monkeypatch):
    """Children in sessions of their own end as well, and the result is a failure that is not retried."""
    monkeypatch.setenv(MARK, "limit")
    result = run([sys.executable, "-c", TREE], discard, limit_s=2)
    assert result.timed_out
    assert result.code != 0
    assert not result.is_transient
    assert until(lambda: not descendants("limit"), 30)


@pytest.mark.parametrize("victim", ["caller", "supervisor"])
def test_kill_9_leaves_no_orphan(victim, tmp_path):
    """Whether it kills the caller or the supervisor, every process of the command ends."""
    call = f"run([{sys.executable!r}, '-c', {TREE!r}], lambda line: print(line, flush=True))"
    code = f"from flows.workspaces.commands import run; {call}"
    environment = {**os.environ, MARK: victim, "TMPDIR": str(tmp_path)}  # it leaves a folder
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout.readline() == "up\n"
        try:
            assert until(
                lambda: len(descendants(victim)) == 4, 30
            )  # caller, supervisor, command, its child in another session
            if victim == "caller":
                caller.kill()
            else:
                children = psutil.Process(caller.pid).children()
                (supervisor,) = (it for it in children if "supervisor.py" in " ".join(it.cmdline()))
                supervisor.kill()
            assert until(lambda: not descendants(victim), 30)
        finally:
            caller.kill()


def test_a_command_may_save_before_it_is_killed(tmp_path):
    """SIGTERM comes first, and SIGKILL after a grace period."""
    script = f"trap 'sleep 0.5; echo saved > {tmp_path}/saved; exit 0' TERM; echo up; while :; do sleep 0.1; done"
    run(["sh", "-c", script], discard, limit_s=1)
    assert (tmp_path / "saved").read_text() == "saved\n"


def test_an_exception_ends_the_command(monkeypatch):
    """Prefect raises one to cancel a run."""
    monkeypatch.setenv(MARK, "exception")

    class CancelledError(Exception):
        """Stands for Prefect's."""

    def on_line(_line):
        raise CancelledError

    with pytest.raises(CancelledError):
        run([sys.executable, "-c", TREE], on_line)
    assert until(lambda: not descendants("exception"), 30)


def test_the_end_of_this_process_ends_the_commands_of_its_threads(monkeypatch):
    """A signal reaches the main thread alone; afterwards no command starts, and nothing is waited for."""
    monkeypatch.setattr(commands, "_STOPPED", threading.Event())
    started, raised = threading.Event(), []

    def compute():
        try:
            run(["sh", "-c", "echo up; sleep 60"], lambda _line: started.set())
        except StoppedError:
            raised.append(True)

    thread = threading.Thread(target=compute)
    thread.start()
    assert started.wait(60)
    stop_commands()
    thread.join(30)

    assert raised
    assert not commands._RUNNING
    for later in (lambda: run(["true"], discard), lambda: pause(60)):
        with pytest.raises(StoppedError):
            later()
    allow_commands()
    assert run(["true"], discard).code == 0


def test_two_at_once_do_not_wait_for_each_other():
    """Neither holds an end of the other's pipe."""
    results = {}
    slow = threading.Thread(target=lambda: results.update(slow=run(["sleep", "30"], discard, limit_s=3)))
    slow.start()
    begin = time.monotonic()
    results["quick"] = run(["true"], discard)
    assert time.monotonic() - begin < 2.5
    slow.join()
    assert results["quick"].code == 0
    assert results["slow"].timed_out


def test_the_supervisor_forwards_a_signal(monkeypatch):
    """A worker that cancels a run signals its group."""
    monkeypatch.setenv(MARK, "signal")

    def on_line(line):
        if line == "up":
            (supervisor,) = (it for it in psutil.Process().children() if "supervisor.py" in " ".join(it.cmdline()))
            os.killpg(supervisor.pid, signal.SIGTERM)

    result = run([sys.executable, "-c", TREE], on_line)
    assert result.code != 0
    assert until(lambda: not descendants("signal"), 30)
