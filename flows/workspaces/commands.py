"""A command line -> its exit code, its lines as they are printed, and what it found as data."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from stages.runtime import supervisor
from stages.runtime.errors import InputError, UnavailableError
from stages.runtime.result import PROGRESS_VARIABLE, RESULT_VARIABLE

Log = Callable[[str], None]
"""Takes one line."""
EXIT_CODE_VARIABLE = "ESPALIER_EXIT_CODE_FILE"
STAGE_SHELL = Path(__file__).parent / "stage_shell.sh"
"""Replaces the user's shell, so that the exit code of a stage that DVC runs is known."""
SIGNALLED = range(129, 193)
"""128 + n: exit codes of a process that signal n killed; DVC's own exit codes lie above."""
MARK = "ESPALIER_COMMAND"
"""Environment variable that every process of one command carries."""
_RUNNING: set["subprocess.Popen[str]"] = set()
"""The supervisors of the commands of all threads."""
_STOPPED = threading.Event()
"""Set once this process is to end."""


class StoppedError(InputError):
    """This process is to end, so its commands were terminated and none starts."""

    def __init__(self) -> None:
        super().__init__("stopped, since the flow ends")


def stop_commands() -> None:
    """Terminate the commands of all threads; their calls of `run` raise StoppedError, and so does every later one."""
    _STOPPED.set()
    for process in tuple(_RUNNING):
        _terminate(process)


def allow_commands() -> None:
    """Let commands start again, once all threads whose commands were stopped have ended."""
    _STOPPED.clear()


def pause(seconds: float) -> None:
    """Sleep before something is tried again.

    Raises:
        StoppedError: `stop_commands` was called.
    """
    _STOPPED.wait(seconds)
    _check_stopped()


@dataclass(frozen=True)
class CommandResult:
    """How a command ended, and what it found."""

    code: int
    """128 + n where signal n killed it."""
    lines: tuple[str, ...] = ()
    timed_out: bool = False
    """Whether it was terminated at its time limit."""
    found: Mapping[str, Any] = field(default_factory=dict)
    """What the command passed to `stages.runtime.result.write_result`, or the message of its InputError."""
    stage_code: int | None = None
    """Exit code of the last command that DVC ran for a stage; None where DVC ran none."""

    @property
    def exit_code(self) -> int:
        """The exit code of the stage that failed, else of the command itself."""
        return self.stage_code or self.code

    @property
    def message(self) -> str:
        """The message of the command's InputError, else its last line."""
        return str(self.found.get("message") or (self.lines[-1] if self.lines else "it printed nothing"))

    @property
    def is_transient(self) -> bool:
        """Whether a retry makes sense: a server was unavailable, or something outside killed the command."""
        code = self.exit_code
        return not self.timed_out and (code == UnavailableError.exit_code or code < 0 or code in SIGNALLED)


def run(
    command: list[str],
    log: Log,
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    limit_s: float | None = None,
    on_progress: Callable[[Mapping[str, Any]], None] | None = None,
) -> CommandResult:
    """Run a program of this environment; no process of it outlives this call, this process, or the time limit.

    Args:
        command: The program and its arguments.
        log: Called with every line that is not empty, without its line end.
        folder: Working folder; None is the current one.
        environment: Changes to this process's environment.
        limit_s: Time limit in seconds; None is no limit.
        on_progress: Called with label, done, total, rate_per_s and left_s when `stages.runtime.progress` reports them.

    Raises:
        StoppedError: `stop_commands` was called, on another thread.
    """
    _check_stopped()
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="espalier-", ignore_cleanup_errors=True) as temporary:
        files = {name: Path(temporary) / name for name in (RESULT_VARIABLE, PROGRESS_VARIABLE, EXIT_CODE_VARIABLE)}
        paths = {name: str(path) for name, path in files.items()}
        process = _start(command, folder, {**(environment or {}), **paths, MARK: mark, "SHELL": str(STAGE_SHELL)})
        expired = threading.Event()
        with _supervised(process, mark, limit_s, expired):
            lines = _read_lines(process, log, files[PROGRESS_VARIABLE], on_progress)
        _check_stopped()
        found, stage_code = _read_json(files[RESULT_VARIABLE]), _read_json(files[EXIT_CODE_VARIABLE])
        return CommandResult(process.wait(), lines, expired.is_set(), found or {}, stage_code)


@contextmanager
def _supervised(
    process: "subprocess.Popen[str]", mark: str, limit_s: float | None, expired: threading.Event
) -> Iterator[None]:
    """Terminate a command at the end of the block, at its time limit, which sets `expired`, or by `stop_commands`."""
    _RUNNING.add(process)
    if _STOPPED.is_set():  # since `run` began
        _terminate(process)
    timer = threading.Timer(limit_s or 0, _expire, (process, expired))
    guard = threading.Thread(target=_kill_survivors, args=(process, mark), daemon=True)
    guard.start()
    if limit_s:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        _terminate(process)
        guard.join(supervisor.GRACE_S + 10)
        _RUNNING.discard(process)
        if process.stdout:
            process.stdout.close()


def _check_stopped() -> None:
    if _STOPPED.is_set():
        raise StoppedError


def _start(command: list[str], folder: Path | None, changes: Mapping[str, str]) -> "subprocess.Popen[str]":
    """Start a command below its supervisor, with this Python's programs first on its path."""
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


def _read_lines(
    process: "subprocess.Popen[str]",
    log: Log,
    progress_file: Path,
    on_progress: Callable[[Mapping[str, Any]], None] | None,
) -> tuple[str, ...]:
    """Log every line until the command ends; progress is written before its line is printed."""
    lines: list[str] = []
    progress = None
    for line in process.stdout or ():
        if line.strip():
            lines.append(line.rstrip())
            log(lines[-1])
        if on_progress and (latest := _read_json(progress_file)) and latest != progress:
            progress = latest
            on_progress(latest)
    return tuple(lines)


def _read_json(path: Path) -> Any:  # noqa: ANN401  # a record or a number
    """Read a file of the command; None where it wrote none."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return None


def _expire(process: "subprocess.Popen[str]", expired: threading.Event) -> None:
    expired.set()
    _terminate(process)


def _terminate(process: "subprocess.Popen[str]") -> None:
    """Close the supervisor's standard input, whereupon it terminates everything."""
    assert process.stdin is not None
    with suppress(OSError, ValueError):
        process.stdin.close()


def _kill_survivors(process: "subprocess.Popen[str]", mark: str) -> None:
    """Wait for the supervisor; where a signal killed it, kill every process that it would have terminated."""
    if process.wait() >= 0:
        return
    for other in psutil.process_iter():
        with suppress(psutil.Error):
            if other.environ().get(MARK) == mark:
                other.kill()
