"""A command line -> the commit and params that it names; a flow's state -> the exit code of the command."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from prefect import State

    from flows.workspaces.repository import ParamsSource, Repository


def find_source(commit: str, preset: str | None, limits: dict[str, float]) -> "tuple[Repository, ParamsSource]":
    """Check the limits and find the commit, so that a mistake is reported before a Prefect server is started."""
    from flows.workspaces.repository import ParamsSource, Repository
    from flows.workspaces.workspace import current_checkout

    if limits and Path("dvc.yaml").is_file():
        current_checkout().check_limits(limits)
    repository = Repository.find()
    return repository, ParamsSource(repository.resolve(commit, lambda _line: None), preset)  # the flow logs the line


def exit_by_state(state: "State[Any]") -> NoReturn:
    """Print a flow's state, and end this process with exit code 0 only if the flow completed."""
    click.echo(f"{state.name}: {state.message}")
    sys.exit(0 if state.is_completed() and state.name == "Completed" else 1)
