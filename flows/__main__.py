"""The one door to the flows: python -m flows NAME."""

import os
import sys
from pathlib import Path

import click

from flows.commands import stage_names
from stages import telemetry
from stages.params import load_params

SETTINGS = {
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
}
"""Defaults that the environment may overrule; with no PREFECT_API_URL, Prefect starts a server for the run alone."""


@click.group()
def main() -> None:
    """Run a flow here and now, with or without a Prefect server."""
    telemetry.switch_off()
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)


@main.command()
def compress() -> None:
    """Bring every stage up to date and record the result."""
    load_params(Path("params.yaml"))
    stage_names()

    from flows.compress import compress as flow

    state = flow(return_state=True)
    sys.exit(0 if state.is_completed() else 1)


if __name__ == "__main__":
    main()
