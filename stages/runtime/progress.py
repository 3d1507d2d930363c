"""Long work -> a bar with rate and time left on a terminal; lines and a progress file elsewhere."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from stages.runtime.result import write_progress
from stages.runtime.wording import format_duration

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 10.0
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
"""tqdm's own bar, but always with items per second, never with seconds per item."""


def track(items: Iterable[Item], label: str, total: int, *, done: int = 0) -> Iterator[Item]:
    """Yield `items` and report progress; `done` of `total` were finished before.

    Of several processes that share a stage, the first reports its own.
    """
    if os.environ.get("RANK", "0") != "0":
        yield from items
    elif sys.stderr.isatty():
        yield from tqdm(items, desc=label, total=total, initial=done, bar_format=BAR)
    else:
        yield from _log(items, label, total, done)


def _log(items: Iterable[Item], label: str, total: int, done: int) -> Iterator[Item]:
    begin = last = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES or done + count == total:
            rate = count / max(now - begin, 1e-9)
            left_s = (total - done - count) / rate
            write_progress(label, done + count, total, rate, left_s)
            print(
                f"{label} {done + count}/{total}, {rate:.3g}/s, {format_duration(left_s)} left",
                file=sys.stderr,
                flush=True,
            )
            last = now
