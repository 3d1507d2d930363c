"""SIGTERM of a machine that is taken away, or Ctrl-C -> the end of the step, a checkpoint, and a clean way out."""

import signal
from types import FrameType, TracebackType
from typing import Self

import click


class StoppedError(click.ClickException):
    """The training was asked to end and has saved itself; the exit code is that of a process ended by the signal."""

    def __init__(self, number: int, step: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step}, which is saved; the same command goes on from there")
        self.exit_code = 128 + number  # type: ignore[misc]  # click reads it off the instance


class Interrupts:
    """Takes note of the first signal; a second one ends the process at once, as without this."""

    def __init__(self) -> None:
        self.number = 0
        self.before: dict[int, object] = {}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # it gave us this one
