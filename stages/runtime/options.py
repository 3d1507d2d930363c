"""Options that the commands of several stages have."""

from collections.abc import Callable
from typing import Any

import click


def processes_option(shared: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the decorator of `--processes`; `shared` says what the processes share."""
    text = f"Number of processes that share {shared}; by default one for each GPU (docs/scaling.md)."
    return click.option("--processes", "count", type=click.IntRange(1), help=text)
