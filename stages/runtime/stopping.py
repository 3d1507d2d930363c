"""Ctrl-C or SIGTERM -> one line, and the exit code of the signal, in place of a traceback or "Aborted!"."""

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from stages.runtime.errors import SignalExit

STDERR = 2
"""Descriptor of standard error."""
received: list[int] = []
"""Signals after which this process tidies up or saves its work, so that nobody sends a second one."""
ADVICE = "what is finished is kept; run the same command again to go on"


def stop_in_one_line(numbers: Iterable[int] = (signal.SIGINT,)) -> None:
    """End this process in one line at the first of some signals, after its files are tidied up; at once at the second.

    The exit code is 128 plus the signal's number, as of a process that the signal ended. A process that a shell started
    with SIGINT ignored, as with `&`, goes on ignoring it.
    """
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def stopped_line(number: int) -> str:
    """Return what a process that a signal stopped prints."""
    return f"Stopped by {signal.Signals(number).name}{' (Ctrl-C)' if number == signal.SIGINT else ''}: {ADVICE}"


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    """Raise a SystemExit, which no `except Exception` of a library catches; of several processes the first prints.

    It writes to the descriptor, since print could be in the middle of a line, and jsonschema's import, among others,
    replaces sys.stderr by an object without one.
    """
    received.append(number)
    signal.signal(number, signal.SIG_DFL)
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # it is closed
            os.write(STDERR, f"\n{stopped_line(number)}\n".encode())
    raise SignalExit(128 + number)
