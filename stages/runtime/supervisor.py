"""A command -> the same command, which outlives neither its caller nor its time limit.

The caller holds the other end of this process's standard input and writes nothing to it. It closes when the caller
wants the command to end, or when a kill -9 ended the caller. Then every process that the command started is ended,
whatever its session and process group: first by SIGTERM, so that it can save, then by SIGKILL.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial

import psutil

GRACE_S = 20.0
"""Seconds between SIGTERM and SIGKILL."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Options of Linux's prctl(2)."""


def main() -> int:
    """Run the command line's command and return its exit code; 128 + n where signal n ended it, as in a shell."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # a process that loses its parent becomes this process's child, not init's
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: _terminate_descendants())
    die_with = partial(_die_with, os.getpid())
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, preexec_fn=die_with)  # noqa: PLW1509, S603
    threading.Thread(target=_wait_for_caller, daemon=True).start()
    code = process.wait()
    _terminate_descendants()
    return 128 - code if code < 0 else code


def _wait_for_caller() -> None:
    """Wait until the caller's end of standard input closes."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # its handler runs in the main thread


def _terminate_descendants() -> None:
    """Terminate every descendant, including those that start meanwhile; kill them after the grace period."""
    deadline = time.monotonic() + GRACE_S
    terminated: set[int] = set()
    while left := _descendants():
        for process in left:
            if time.monotonic() > deadline:
                _signal(process, signal.SIGKILL)
            elif process.pid not in terminated:
                terminated.add(process.pid)
                _signal(process, signal.SIGTERM)
        time.sleep(0.05)  # psutil's own wait would collect the exit code of the command


def _descendants() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if _is_alive(process)]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # its parent has just collected it
        return False


def _signal(process: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _die_with(supervisor: int) -> None:
    """Let the kernel kill the command when the supervisor ends, even by SIGKILL, and even before this call."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != supervisor:
        os.kill(os.getpid(), signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    """Call prctl on Linux; elsewhere, children of the command that are in other sessions are not followed."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
