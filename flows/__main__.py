"""The command line of the flows: python -m flows NAME."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows import options
from flows.clean import clean
from flows.comparisons import compare
from flows.entry import exit_by_state, find_source
from flows.tasks.server import find_server
from flows.tasks.temporary_server import ensure_server
from flows.workspaces.overrides import parse_grid, parse_limits, parse_overrides
from stages.runtime import telemetry
from stages.runtime.environment import bypass_proxies, check_network
from stages.runtime.errors import InputError
from stages.runtime.text import printable

if TYPE_CHECKING:
    from prefect import State

    from stages.register.promotion import Decision
    from stages.register.reproduce import Reproduction


@click.group()
def main() -> None:
    """Run a flow in this process, with or without a Prefect server."""
    telemetry.switch_off()
    bypass_proxies()
    check_network()
    os.environ.setdefault("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", "ignore")


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def repro(arguments: tuple[str, ...]) -> None:
    """Run `dvc repro ARGUMENTS` in the current folder, after other runs in it have ended; no Prefect is involved."""
    from flows.workspaces.checkout import run_dvc_repro

    run_dvc_repro(arguments, lambda line: click.echo(line, err=True))


@main.command()
@options.set_option
@options.preset_option
@click.option("--commit", default=None, help="A branch, tag or hash; by default the current folder as it stands.")
@options.limit_option
@click.option("--register", "to_register", is_flag=True, help="Make the result a version in MLflow's registry.")
def compress(
    texts: tuple[str, ...], preset: str | None, commit: str | None, limits: tuple[str, ...], *, to_register: bool
) -> None:
    """Bring every stage up to date and record the result, in the current folder or in a workspace of its own."""
    overrides, minutes = parse_overrides(texts), parse_limits(limits)
    if commit is None and (overrides or preset):
        commit = "HEAD"
    if commit is None:
        from flows.workspaces.workspace import current_checkout

        current_checkout().check_limits(minutes)
    else:
        repository, source = find_source(commit, preset, minutes)
        repository.render(source, [overrides])

    ensure_server()
    from flows.compress import compress as flow

    exit_by_state(flow(overrides, commit, minutes, preset=preset, to_register=to_register, return_state=True))


@main.command()
@click.option("--grid", "grids", multiple=True, required=True, metavar="KEY=VALUE,…", help="The values of a key.")
@options.set_option
@options.preset_option
@options.commit_option
@options.runner_option
@options.jobs_option
@options.limit_option
@click.option("--best", type=click.IntRange(0), default=1, help="How many of the best become versions.")
def sweep(grids: tuple[str, ...], texts: tuple[str, ...], limits: tuple[str, ...], **given: Any) -> None:  # noqa: ANN401
    """Compress every combination of some values: one table, one plot; a second run continues an interrupted one."""
    from flows.workspaces.grid import check_disjoint, plan_sweep

    grid, overrides, minutes = parse_grid(grids), parse_overrides(texts), parse_limits(limits)
    check_disjoint(grid, overrides)
    plan_sweep(*find_source(given["commit"], given["preset"], minutes), grid, overrides)

    ensure_server()
    from flows.sweep import sweep as flow

    exit_by_state(flow(grid, overrides, limits=minutes, return_state=True, **given))


@main.command()
@options.set_option
@options.commit_option
@options.policy_option
@options.limit_option
def nightly(texts: tuple[str, ...], commit: str, policy: str, limits: tuple[str, ...]) -> None:
    """Compress the current base, register the result, and promote it or report why not."""
    overrides, minutes = parse_overrides(texts), parse_limits(limits)
    repository, source = find_source(commit, None, minutes)
    repository.render(source, [overrides])

    ensure_server()
    from flows.nightly import nightly as flow

    exit_by_state(flow(overrides, commit, policy, minutes, return_state=True))


@main.command()
@click.argument("name")
@click.option("--version", "uri", default=None, help="models:/NAME/3; by default the challenger.")
@options.policy_option
@click.option("--why", default=None, help="Reason, for the ledger.")
def promote(name: str, uri: str | None, policy: str, why: str | None) -> None:
    """Decide by the policy whether a version of the model NAME becomes its champion."""
    if find_server():
        from flows.promotion import promote as flow

        decision = _result(flow(name, uri, policy, why, return_state=True))
    else:
        from stages.register.policy import load_policy

        rules = load_policy(Path(policy))  # a mistake in it is reported before anything heavy is imported

        from stages.register import promotion

        decision = promotion.promote(name, uri, rules, why)
    _print_checks(decision)
    click.echo(printable(decision.message()))
    sys.exit(0 if decision.passed else 1)


@main.command()
@click.argument("name")
@options.policy_option
@click.option("--why", required=True, help="Reason, for the ledger.")
@click.option("--unseen", is_flag=True, help="In an emergency: skip the check of its samples.")
def rollback(name: str, policy: str, why: str, *, unseen: bool) -> None:
    """Make the previous champion of the model NAME the champion again."""
    if find_server():
        from flows.promotion import rollback as flow

        decision = _result(flow(name, why, policy, unseen=unseen, return_state=True))
    else:
        from stages.register.policy import load_policy

        rules = None if unseen else load_policy(Path(policy))

        from stages.register import promotion

        decision = promotion.roll_back(name, rules, why)
    _print_checks(decision)
    click.echo(f"{decision.uri} is the champion again, {decision.replaces} is withdrawn")


@main.command()
@click.argument("uri")
@click.option(
    "--repository",
    envvar="ESPALIER_REPOSITORY",
    help="Folder or address to clone from; by default this checkout, or a remote that ESPALIER_REMOTES allows.",
)
@click.option("--keep", "workspace", default=None, help="An empty folder for the work, which is kept.")
def reproduce(uri: str, repository: str | None, workspace: str | None) -> None:
    """Repeat the work of a version, such as models:/NAME/3, without caches, and compare the results."""
    found: Reproduction
    if find_server():
        from flows.promotion import reproduce as flow

        found = _result(flow(uri, repository, workspace, return_state=True))
    else:
        from stages.register.reproduce import reproduce as run_again

        found = run_again(uri, repository, Path(workspace) if workspace else None)
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


@main.command()
@click.argument("name")
def ledger(name: str) -> None:
    """Print every promotion and rollback of the model NAME: when, by whom, why, from which version to which."""
    from stages.register.ledger import Ledger
    from stages.register.registry import Registry

    lines = [entry.line() for entry in Ledger(Registry(), name).entries()]
    click.echo("\n".join(lines) or f"model {name} has no promotions yet")


@main.command()
@click.option("--file", "path", type=Path, default=Path("prefect.yaml"), help="The file of deployments.")
@click.option("--pool", default=None, help="Work pool of the deployments for which the file names none.")
def deploy(path: Path, pool: str | None) -> None:
    """Check the deployments of prefect.yaml, schedules and pools included, and create them on the Prefect server."""
    from flows.tasks.server import load_settings

    load_settings()
    from flows.deploy import deploy as create_deployments

    create_deployments(path, pool)


@main.command()
def server() -> None:
    """Start Prefect's server: with a password, closed to other web pages, and on loopback."""
    from flows.server import start_server

    start_server()


main.add_command(clean)
main.add_command(compare)


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


if __name__ == "__main__":
    main()
