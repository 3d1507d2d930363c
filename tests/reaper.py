"""A session of pytest -> no process of it, once it has ended, also by SIGTERM or SIGKILL.

pytest holds the other end of this program's standard input, which closes when pytest ends. Every process that a test
starts inherits the session's mark in its environment, whatever its parent, session and user.
"""

import contextlib
import os
import sys
import time
import uuid

import psutil

MARK = "TESTS_SESSION"
"""Environment variable of everything that a session of pytest starts."""


def start_reaper() -> None:
    """Mark what this process starts from now on, and start the program that ends it; once for all workers."""
    if MARK not in os.environ:
        os.environ[MARK] = uuid.uuid4().hex
        reading, _ = os.pipe()  # the other end stays open as long as this process lives
        command = [sys.executable, __file__, os.environ[MARK]]
        os.posix_spawn(
            sys.executable, command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, reading, 0)], setsid=True
        )
        os.close(reading)


def kill_marked(mark: str) -> None:
    """Kill the processes that carry a mark, and those that they start meanwhile."""
    while found := [process for process in psutil.process_iter() if process.pid != os.getpid() and _has(process, mark)]:
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)


def _has(process: psutil.Process, mark: str) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark
    return False


if __name__ == "__main__":
    os.environ.pop(MARK, None)
    while os.read(0, 1):
        pass
    kill_marked(sys.argv[1])
