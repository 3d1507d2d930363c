"""The one door to the flows: python -m flows NAME."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flows.commands import stage_names
from stages import telemetry
from stages.params import load_params

if TYPE_CHECKING:
    from stages.register.promotion import Decision

SETTINGS = {
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
}
"""Defaults that the environment may overrule; with no PREFECT_API_URL, Prefect starts a server for the run alone."""

policy_option = click.option(
    "--policy", type=Path, default=Path("mlflow/promotion.yaml"), help="What a version must show."
)


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


@main.command()
@click.argument("name")
@click.option("--version", "uri", default=None, help="models:/NAME/3; the challenger without it.")
@policy_option
@click.option("--why", default=None, help="For the ledger.")
def promote(name: str, uri: str | None, policy: Path, why: str | None) -> None:
    """Decide by the policy whether a version of the model NAME becomes its champion."""
    from stages.register import promotion
    from stages.register.policy import load_policy

    decision = promotion.promote(name, uri, load_policy(policy), why)
    _tell(decision)
    if not decision.passed:
        refused = sum(not check.passed for check in decision.checks)
        click.echo(f"{decision.uri} is refused, by {refused} of {len(decision.checks)} checks; no alias was moved")
        sys.exit(1)
    click.echo(f"{decision.uri} is the champion{f', after {decision.replaces}' if decision.replaces else ''}")


@main.command()
@click.argument("name")
@policy_option
@click.option("--why", required=True, help="For the ledger.")
@click.option("--unseen", is_flag=True, help="In an emergency: do not look first whether it still draws.")
def rollback(name: str, policy: Path, why: str, *, unseen: bool) -> None:
    """Make the previous champion of the model NAME the champion again."""
    from stages.register import promotion
    from stages.register.policy import load_policy

    decision = promotion.roll_back(name, None if unseen else load_policy(policy), why)
    _tell(decision)
    click.echo(f"{decision.uri} is the champion again, {decision.replaces} is withdrawn")


@main.command()
@click.argument("uri")
@click.option("--repository", default=None, help="Where to clone from; this checkout, or the version's own remote.")
@click.option("--keep", "workspace", type=Path, default=None, help="An empty folder for the work, which stays.")
def reproduce(uri: str, repository: str | None, workspace: Path | None) -> None:
    """Do the work of a version, such as models:/NAME/3, once more, without caches, and say what comes out."""
    from stages.register.reproduce import reproduce as run_again

    found = run_again(uri, repository, workspace)
    for line in found.machine:
        click.echo(f"other machine: {line}")
    for file in found.files:
        click.echo(f"✗ {file.path}: {file.what}")
    for metric in found.metrics:
        mark = "✓" if metric.is_equal else "✗"
        click.echo(
            f"{mark} {metric.name}: {metric.then:.6g} then, {metric.now:.6g} now; allowed: ± {metric.allowed:.2g}"
        )
    same = f"{found.num_files - len(found.files)} of {found.num_files} files have the same hash"
    click.echo(f"{found.uri} is {found.verdict}: {found.hindrance or same}")
    sys.exit(1 if found.verdict == "different" else 0)


@main.command()
@click.argument("name")
def ledger(name: str) -> None:
    """Print who did what to the model NAME, when, why, from what, to what."""
    from stages.register.ledger import Ledger
    from stages.register.registry import Registry

    acts = Ledger(Registry(), name).acts()
    for act in acts:
        click.echo(
            f"{act.number:>4}  {act.at}  {act.kind} {act.start} -> {act.to}: {act.outcome}, by {act.by}: {act.why}"
        )
    if not acts:
        click.echo(f"nothing was promoted yet under the name {name}")


def _tell(decision: "Decision") -> None:
    for check in decision.checks:
        mark = click.style("✓", fg="green") if check.passed else click.style("✗", fg="red")
        click.echo(f"{mark} {check.name}: {check.reason}")


if __name__ == "__main__":
    main()
