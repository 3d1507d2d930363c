"""Nothing that a test starts outlives pytest."""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest

from tests import reaper
from tests.orchestra import is_alive, until

SESSION = """
import os, subprocess, sys, time
sys.path.insert(0, os.path.join(os.getcwd(), "tests"))
from reaper import start_reaper
start_reaper()
server = subprocess.Popen(["sh", "-c", "trap '' TERM HUP; sleep 600 & wait"], start_new_session=True)
print(server.pid, flush=True)
time.sleep(600)
"""
"""A session of pytest with one server, which has a session of its own, a child, and no ear for SIGTERM."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_session_leaves_no_server(root, number):
    """Neither the server nor its child is left, whichever signal ended the session."""
    environment = {key: value for key, value in os.environ.items() if key != reaper.MARK}
    command = [sys.executable, "-c", SESSION]
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as session:
        server = psutil.Process(int(session.stdout.readline()))
        (child,) = until(server.children, 10)
        session.send_signal(number)

    assert until(lambda: not any(is_alive(process) for process in (server, child)), 20)


def test_processes_of_others_stay():
    """Only what carries the mark is ended."""
    mark = uuid.uuid4().hex
    own, other = (
        subprocess.Popen(["sleep", "60"], env={**os.environ, reaper.MARK: name}) for name in (mark, "another session")
    )
    reaper.kill_marked(mark)

    assert own.wait(5) == -signal.SIGKILL
    assert other.poll() is None
    other.kill()
    other.wait()


def test_this_session_has_a_reaper():
    """All that its tests start carries its mark, and the program lies where pytest finds it."""
    assert os.environ[reaper.MARK]
    assert Path(reaper.__file__).is_file()
