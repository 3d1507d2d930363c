"""A command line -> how it ended, its lines handed on as they come."""

import os
import re
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from flows.workspaces import supervisor

STAGE_CODE = re.compile(r"failed to run: .*, exited with (-?\d+)")
"""DVC exits with 255 whatever a stage's own exit code was, but tells it."""
DVC_FAILED = 255
"""What DVC says where no stage failed but DVC itself."""
SIGNALLED = 128
NETWORK = re.compile(r"(?i)connect|timed? ?out|unavailable|reset by|refused|failed to (?:pull|push|fetch)")
MARK = "ESPALIER_COMMAND"
"""Of the environment of all that one command started, by which they can be found."""
TEMPORARY = 75
"""Of stages.errors.UnavailableError."""


@dataclass(frozen=True)
class CommandResult:
    """How a command ended."""

    code: int
    """Of the stage, where DVC ran one that failed; 128 + n where signal n ended it."""
    is_late: bool = False
    """Whether it was ended because its time was over."""
    lines: tuple[str, ...] = ()

    @property
    def is_transient(self) -> bool:
        """Whether another try makes sense: a server was away, or something outside killed it. A mistake stays one."""
        if self.is_late or self.code == DVC_FAILED:
            return not self.is_late and any(NETWORK.search(line) for line in self.lines if line.startswith("ERROR"))
        return self.code == TEMPORARY or self.code < 0 or self.code > SIGNALLED


def run(
    command: list[str],
    log: Callable[[str], None],
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    limit_s: float | None = None,
) -> CommandResult:
    """Run a program of this environment; all that it starts dies with this call, with this process, or at its limit.

    Args:
        command: The program and its arguments.
        log: Takes every line, without its end.
        folder: Where it works; here without one.
        environment: What differs from this process's.
        limit_s: Its time in seconds; endless without.
    """
    mark = uuid.uuid4().hex
    process = _start(command, folder, {**(environment or {}), MARK: mark})
    assert process.stdout is not None
    is_over = threading.Event()
    timer = threading.Timer(limit_s or 0, _end, (process, is_over))
    guard = threading.Thread(target=_bury, args=(process, mark), daemon=True)
    guard.start()
    if limit_s:
        timer.start()
    lines: list[str] = []
    try:
        for line in process.stdout:
            if line.strip():
                lines.append(line.rstrip())
                log(lines[-1])
    finally:
        timer.cancel()
        _close(process)
        guard.join(supervisor.GRACE_S + 10)
        process.stdout.close()
    code = process.wait()
    found = [int(match[1]) for line in lines if (match := STAGE_CODE.search(line))]
    return CommandResult(found[-1] if found and code else code, is_over.is_set(), tuple(lines))


def _start(command: list[str], folder: Path | None, changes: Mapping[str, str]) -> "subprocess.Popen[str]":
    """Start a command below its warden, this environment first on its path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.Popen(
        [sys.executable, "-I", supervisor.__file__, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=folder,
        env={**os.environ, **changes, "PATH": path},
        start_new_session=True,
    )


def _end(process: "subprocess.Popen[str]", is_over: threading.Event) -> None:
    is_over.set()
    _close(process)


def _close(process: "subprocess.Popen[str]") -> None:
    """Log the warden to end everything."""
    assert process.stdin is not None
    with suppress(OSError, ValueError):
        process.stdin.close()


def _bury(process: "subprocess.Popen[str]", mark: str) -> None:
    """Wait for the warden, then end whoever outlives it: nobody, unless something killed the warden."""
    if process.wait() >= 0:
        return
    for other in psutil.process_iter():
        with suppress(psutil.Error):
            if other.environ().get(MARK) == mark:
                other.kill()
