"""The state of a run -> the last line of a terminal, below the lines that are printed."""

import shutil
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import click

TICK_S = 1.0


class StatusLine:
    """Keeps the state of a run in the last line of a terminal, below the lines that are printed.

    Args:
        status: Describes the state in one line; called each second and after each line.
    """

    def __init__(self, status: Callable[[], str]) -> None:
        self.status, self.lock, self.stopped = status, threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopped.set()
        self.thread.join()
        with self.lock:
            self._write("")

    def print(self, line: str) -> None:
        """Print a line above the status."""
        with self.lock:
            self._write("")
            click.echo(line)
            self._write(self.status())

    def _tick(self) -> None:
        while not self.stopped.wait(TICK_S):
            with self.lock:
                self._write(self.status())

    def _write(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write(f"\r\x1b[K{text[:width]}")
        sys.stderr.flush()
