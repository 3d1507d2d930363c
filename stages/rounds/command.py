"""A stage and its options -> the finished command of that stage, which does not outlive this process."""

import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from stages.runtime import supervisor
from stages.runtime.stopping import received


def run_stage(package: str, options: Mapping[str, Path]) -> None:
    """Run `python -m PACKAGE --KEY VALUE …` in a process of its own and wait for it.

    SIGTERM and SIGINT end the command first, which may take as long as a checkpoint, and then this process.

    Raises:
        SystemExit: The command failed, with its exit code, or a signal came.
    """
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    command = [sys.executable, "-I", supervisor.__file__, sys.executable, "-m", package, *arguments]
    previous = {number: signal.signal(number, _exit) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:  # noqa: S603  # the end of stdin ends it
            code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if code:
        sys.exit(code)


def _exit(number: int, _frame: FrameType | None) -> None:
    received.append(number)
    sys.exit(128 + number)
