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


IMPORT = """
import signal
signal.signal(signal.SIGTERM, signal.default_int_handler)
from stages.runtime.imports import importing

with importing():
    try:
        import {module}
    except BaseException:
        pass
print("went on")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_an_import_is_not_lost(tmp_path, number):
    """A library that catches everything as it imports another would lose the exception, and a flow would go on."""
    (tmp_path / "slow_module.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\n")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    code = IMPORT.format(module="slow_module")
    captured = {"capture_output": True, "text": True, "timeout": 60}
    result = subprocess.run([sys.executable, "-c", code], env=environment, check=False, **captured)

    assert result.returncode == 128 + number
    assert "Stopped by SIG" in result.stderr
    assert "went on" not in result.stdout
