"""Commands: their lines, their end, and that nothing of them outlives whoever asked for them."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest

from flows.workspaces.commands import run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children in other sessions are followed on Linux")
MARK = "ESPALIER_TEST_MARK"
TREE = """
import subprocess, time
subprocess.Popen(["sleep", "300"], start_new_session=True)
print("up", flush=True)
time.sleep(300)
"""


def marked(mark):
    """Find living processes that carry a mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def until(condition, seconds=30):
    """Wait for something to become true, and say whether it did."""
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def say(_line):
    """Take a line."""


def test_lines_and_code_come_through():
    """In order, both streams, without empty ones."""
    lines = []
    result = run(["sh", "-c", "echo one; echo; echo two >&2; exit 3"], lines.append)
    assert lines == ["one", "two"] == list(result.lines)
    assert (result.code, result.is_transient, result.is_late) == (3, False, False)


@pytest.mark.parametrize(
    ("script", "code", "is_transient"),
    [
        ("exit 1", 1, False),
        ("exit 75", 75, True),
        ("kill -9 $$", 137, True),
        ("echo \"ERROR: failed to reproduce 'x': failed to run: y, exited with 1\"; exit 255", 1, False),
        ("echo \"ERROR: failed to reproduce 'x': failed to run: y, exited with 75\"; exit 255", 75, True),
        ("echo 'ERROR: failed to pull'; exit 255", 255, True),
    ],
)
def test_only_what_may_pass_is_worth_another_try(script, code, is_transient):
    """A mistake stays one, whatever DVC makes of its exit code."""
    result = run(["sh", "-c", script], say)
    assert (result.code, result.is_transient) == (code, is_transient)


def test_a_limit_ends_everything(monkeypatch):
    """Children in sessions of their own, too; and it is no success."""
    monkeypatch.setenv(MARK, "limit")
    result = run([sys.executable, "-c", TREE], say, limit_s=2)
    assert result.is_late
    assert result.code != 0
    assert not result.is_transient
    assert until(lambda: not marked("limit"))


@pytest.mark.parametrize("victim", ["caller", "warden"])
def test_kill_9_leaves_no_orphan(victim):
    """Of whoever asked, or of the warden itself: every process of the command goes."""
    ask = f"run([{sys.executable!r}, '-c', {TREE!r}], lambda line: print(line, flush=True))"
    code = f"from flows.commands import run; {ask}"
    environment = {**os.environ, MARK: victim}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout.readline() == "up\n"
        try:
            assert until(lambda: len(marked(victim)) == 4)  # caller, warden, command, its child in another session
            if victim == "caller":
                caller.kill()
            else:
                children = psutil.Process(caller.pid).children()
                (warden,) = (it for it in children if "warden.py" in " ".join(it.cmdline()))
                warden.kill()
            assert until(lambda: not marked(victim))
        finally:
            caller.kill()


def test_what_can_save_itself_may(tmp_path):
    """SIGTERM comes first, and time after it."""
    script = f"trap 'sleep 0.5; echo saved > {tmp_path}/saved; exit 0' TERM; echo up; while :; do sleep 0.1; done"
    run(["sh", "-c", script], say, limit_s=1)
    assert (tmp_path / "saved").read_text() == "saved\n"


def test_an_exception_ends_the_command(monkeypatch):
    """As Prefect raises one to cancel a run."""
    monkeypatch.setenv(MARK, "exception")

    class CancelledError(Exception):
        """What arrives."""

    def on_line(_line):
        raise CancelledError

    with pytest.raises(CancelledError):
        run([sys.executable, "-c", TREE], on_line)
    assert until(lambda: not marked("exception"))


def test_two_at_once_do_not_wait_for_each_other():
    """One holds no end of the other's pipe."""
    endings = {}
    slow = threading.Thread(target=lambda: endings.update(slow=run(["sleep", "30"], say, limit_s=3)))
    slow.start()
    begin = time.monotonic()
    endings["quick"] = run(["true"], say)
    assert time.monotonic() - begin < 2.5
    slow.join()
    assert endings["quick"].code == 0
    assert endings["slow"].is_late


def test_the_warden_hands_a_signal_on(monkeypatch):
    """A worker that cancels a run signals its group."""
    monkeypatch.setenv(MARK, "signal")

    def on_line(line):
        if line == "up":
            (warden,) = (it for it in psutil.Process().children() if "warden.py" in " ".join(it.cmdline()))
            os.killpg(warden.pid, signal.SIGTERM)

    result = run([sys.executable, "-c", TREE], on_line)
    assert result.code != 0
    assert until(lambda: not marked("signal"))
