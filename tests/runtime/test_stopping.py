"""Ctrl-C and SIGTERM: one line, the signal's exit code, and files tidied up."""

import os
import signal
import subprocess
import sys

import pytest

from tests.servers import ROOT

SCRIPT = """
import os, signal, sys, time
import click
from stages.runtime.stopping import stop_in_one_line

@click.command()
@click.argument("number", type=int)
def main(number):
    try:
        os.kill(os.getpid(), number)
        time.sleep(20)
    except Exception:
        print("a library went on")
    finally:
        print("tidied up")

stop_in_one_line((signal.SIGINT, signal.SIGTERM))
main()
"""


def run(number, **variables):
    """Run a command that a signal stops."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(int(number))],
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "SIGINT (Ctrl-C)"), (signal.SIGTERM, "SIGTERM")])
def test_a_stopped_command_says_so_in_one_line(number, name):
    """No "Aborted!", no traceback; what the command would remove at its end is removed."""
    result = run(number)

    assert (result.returncode, result.stdout) == (128 + number, "tidied up\n")
    assert result.stderr.strip() == (
        f"Stopped by {name}: what is finished is kept; run the same command again to go on"
    )


def test_of_several_processes_one_says_so():
    """They share a terminal, and Ctrl-C reaches each."""
    assert run(signal.SIGINT, RANK="1").stderr == ""
    assert "Stopped by SIGINT" in run(signal.SIGINT, RANK="0").stderr


REDIRECTED = """
import contextlib, io, os, signal
from stages.runtime.stopping import stop_in_one_line

stop_in_one_line((signal.SIGINT, signal.SIGTERM))
try:
    with contextlib.redirect_stderr(io.StringIO()):
        os.kill(os.getpid(), {number})
except Exception:
    pass
print("went on")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_not_lost_while_standard_error_is_replaced(number):
    """A flow went on when it came while jsonschema was imported, which does that."""
    code, captured = REDIRECTED.format(number=int(number)), {"capture_output": True, "text": True, "timeout": 60}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, check=False, **captured)

    assert result.returncode == 128 + number
    assert "Stopped by SIG" in result.stderr
    assert "went on" not in result.stdout
