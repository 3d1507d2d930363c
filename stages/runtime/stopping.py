"""Ctrl-C or SIGTERM -> one line, and the exit code of the signal, in place of a traceback or "Aborted!"."""

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

ADVICE = "what is finished is kept; run the same command again to go on"


def stop_in_one_line(numbers: Iterable[int] = (signal.SIGINT,)) -> None:
    """End this process in one line at the first of some signals, after its files are tidied up; at once at the second.

    The exit code is 128 plus the signal's number, as of a process that the signal ended. A process that a shell started
    with SIGINT ignored, as with `&`, goes on ignoring it.
    """
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """End this process without raising at a SIGINT or SIGTERM within the block, in which nothing needs to be tidied up.

    Some libraries catch every exception as they import others, that of a signal, too, which would then be lost. Signals
    whose default is to end the process, and those that are ignored, stay as they are; so do all off the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    changed = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in changed:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler)


def stopped_line(number: int, advice: str = ADVICE) -> str:
    """Return what a process that a signal stopped prints."""
    return f"Stopped by {signal.Signals(number).name}{' (Ctrl-C)' if number == signal.SIGINT else ''}: {advice}"


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    """Raise SystemExit, which no `except Exception` of a library catches."""
    signal.signal(number, signal.SIG_DFL)
    _tell(number)
    raise SystemExit(128 + number)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    _tell(number)
    os._exit(128 + number)


def _tell(number: int) -> None:
    """Print the line; of several processes the first does."""
    if os.environ.get("RANK", "0") == "0":
        os.write(sys.stderr.fileno(), f"\n{stopped_line(number)}\n".encode())  # print could be in the middle of a line
