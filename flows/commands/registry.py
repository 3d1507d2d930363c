"""The commands of the model registry: promote, rollback, reproduce, ledger."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows import options
from stages.runtime.errors import InputError
from stages.runtime.text import printable

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from prefect import State

    from stages.register.promotion import Decision
    from stages.register.reproduce import Reproduction


@click.command()
@click.argument("name")
@click.option("--version", "uri", default=None, help="models:/NAME/3; by default the challenger.")
@options.policy_option
@click.option("--why", default=None, help="Reason, for the ledger.")
def promote(name: str, uri: str | None, policy: str, why: str | None) -> None:
    """Decide by the policy whether a version of the model NAME becomes its champion."""
    from flows.tasks.server import find_server

    if find_server():
        from flows.promotion import promote as flow

        decision = _result(flow(name, uri, policy, why, return_state=True))
    else:
        from stages.register.policy import load_policy

        rules = load_policy(Path(policy))  # a mistake in it is reported before anything heavy is imported

        from stages.register import promotion

        with _beside_runs():
            decision = promotion.promote(name, uri, rules, why)
    _print_checks(decision)
    click.echo(printable(decision.message()))
    sys.exit(0 if decision.passed else 1)


@click.command()
@click.argument("name")
@options.policy_option
@click.option("--why", required=True, help="Reason, for the ledger.")
@click.option("--unseen", is_flag=True, help="In an emergency: skip the check of its samples.")
def rollback(name: str, policy: str, why: str, *, unseen: bool) -> None:
    """Make the previous champion of the model NAME the champion again."""
    from flows.tasks.server import find_server

    if find_server():
        from flows.promotion import rollback as flow

        decision = _result(flow(name, why, policy, unseen=unseen, return_state=True))
    else:
        from stages.register.policy import load_policy

        rules = None if unseen else load_policy(Path(policy))

        from stages.register import promotion

        with _beside_runs():
            decision = promotion.roll_back(name, rules, why)
    _print_checks(decision)
    click.echo(f"{decision.uri} is the champion again, {decision.replaces} is withdrawn")


@click.command()
@click.argument("uri")
@click.option(
    "--repository",
    envvar="ESPALIER_REPOSITORY",
    help="Folder or address to clone from; by default this checkout, or a remote that ESPALIER_REMOTES allows.",
)
@click.option("--keep", "workspace", default=None, help="An empty folder for the work, which is kept.")
@click.option(
    "--trust",
    is_flag=True,
    help="Run the code of a model that the version's params trust and its commit does not name.",
)
def reproduce(uri: str, repository: str | None, workspace: str | None, *, trust: bool) -> None:
    """Repeat the work of a version, such as models:/NAME/3, without caches, and compare the results."""
    found: Reproduction
    from flows.tasks.server import find_server

    if find_server():
        from flows.promotion import reproduce as flow

        found = _result(flow(uri, repository, workspace, trust=trust, return_state=True))
    else:
        from stages.register.reproduce import reproduce as run_again

        with _beside_runs():
            found = run_again(uri, repository, Path(workspace) if workspace else None, trust=trust)
    for line in found.machine:
        click.echo(f"other machine: {line}")
    for file in found.files:
        click.echo(f"✗ {file.path}: {file.what}")
    for metric in found.metrics:
        mark = "✓" if metric.is_equal else "✗"
        values = f"{metric.then:.6g} then, {metric.now:.6g} now; allowed: ± {metric.allowed:.2g}"
        click.echo(f"{mark} {metric.name}: {values}")
    same = f"{found.num_files - len(found.files)} of {found.num_files} files have the same hash"
    click.echo(f"{found.uri} is {found.verdict}: {found.obstacle or same}")
    sys.exit(1 if found.verdict == "different" else 0)


@click.command()
@click.argument("name")
def ledger(name: str) -> None:
    """Print every promotion and rollback of the model NAME: when, by whom, why, from which version to which."""
    from stages.register.ledger import Ledger
    from stages.register.registry import Registry

    lines = [entry.line() for entry in Ledger(Registry(), name).entries()]
    click.echo("\n".join(lines) or f"model {name} has no promotions yet")


def _beside_runs() -> "AbstractContextManager[None]":
    """Wait for a run that takes times, as the flows do."""
    from flows.workspaces.machine import beside_runs

    return beside_runs(partial(click.echo, err=True))


def _result(state: "State[Any]") -> Any:  # noqa: ANN401
    """Return the data of a flow's state.

    Raises:
        InputError: The flow failed.
    """
    if state.data is None:
        raise InputError(state.message or f"the flow ended as {state.name}")
    return state.result(raise_on_failure=False)


def _print_checks(decision: "Decision") -> None:
    for check in decision.checks:
        mark = click.style("✓", fg="green") if check.passed else click.style("✗", fg="red")
        click.echo(f"{mark} {printable(check.name)}: {printable(check.reason)}")
