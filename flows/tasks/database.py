"""Prefect's own database -> a file that only its owner may read, since flow runs hold parameters and messages."""

import os
from contextlib import suppress
from pathlib import Path

ADDRESSES = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")
"""Environment variables with which a server uses another database."""


def create_database() -> None:
    """Create the empty database of a server that is about to start, unless it is there or in another place."""
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    if not any(os.environ.get(variable) for variable in ADDRESSES):
        with suppress(OSError):  # Prefect says what is wrong with its folder
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            (home / "prefect.db").touch(mode=0o600)
