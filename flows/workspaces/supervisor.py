"""A command -> the same command, which outlives neither its caller nor its time.

The caller holds the other end of this process's standard input and writes nothing to it. When it closes, because the
caller wants the command to end or because a kill -9 ended the caller, everything that the command started is ended,
in however many sessions and process groups: first by SIGTERM, so that it can save, then by SIGKILL.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil

GRACE_S = 20.0
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Of Linux's prctl(2)."""


def main() -> int:
    """Run the command line's command and give its exit code; 128 + n where signal n ended it, as in a shell."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # who loses its parent becomes our child, not init's
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _end_all())
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)  # noqa: PLW1509
    threading.Thread(target=_watch, daemon=True).start()
    code = process.wait()
    _end_all()
    return 128 - code if code < 0 else code


def _watch() -> None:
    """Wait until nobody holds the other end."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)  # its handler runs in the main thread


def _end_all() -> None:
    """End every descendant, those that appear meanwhile too."""
    deadline = time.monotonic() + GRACE_S
    asked: set[int] = set()
    while left := _descendants():
        for process in left:
            if time.monotonic() > deadline:
                _signal(process, signal.SIGKILL)
            elif process.pid not in asked:
                asked.add(process.pid)
                _signal(process, signal.SIGTERM)
        time.sleep(0.05)  # psutil's own wait would take the exit code of the command away from us


def _descendants() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def _signal(process: psutil.Process, number: int) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _die_with_parent() -> None:
    """Die at once where this warden does, by whose hand ever."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    """Ask Linux; other systems have neither, and there a command's own children in other sessions are not followed."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
