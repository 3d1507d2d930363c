"""Long work -> a bar with rate and ETA on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

SECONDS_BETWEEN_LINES = 10.0


def track(items: Iterable[Item], label: str, total: int, *, done: int = 0) -> Iterator[Item]:
    """Yield `items`, telling how far the work is; `done` of `total` were finished before."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=label, total=total, initial=done)
    else:
        yield from _log(items, label, total, done)


def _log(items: Iterable[Item], label: str, total: int, done: int) -> Iterator[Item]:
    begin = last = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES or done + count == total:
            rate = count / max(now - begin, 1e-9)
            eta_seconds = (total - done - count) / rate
            print(
                f"{label} {done + count}/{total}, {rate:.1f}/s, {eta_seconds:.0f} s left", file=sys.stderr, flush=True
            )
            last = now
