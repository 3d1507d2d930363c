"""SIGTERM or Ctrl-C -> a checkpoint at the end of the step, and the exit code of the signal."""

import signal
from types import FrameType, TracebackType
from typing import Self

import click

from stages.runtime.stopping import received


class StoppedError(click.ClickException):
    """The training was stopped by a signal and has saved a checkpoint.

    The exit code is 128 plus the number of the signal, as of a process that the signal ended.
    """

    def __init__(self, number: int, step: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step}, which is saved; run the same command again to resume")
        self.exit_code = 128 + number  # type: ignore[misc]  # click reads it from the instance


class Interrupts:
    """Records the number of the first SIGTERM or SIGINT; the second one ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        self.previous: dict[int, object] = {}

    def _record(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self.previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # signal.signal returned this handler
