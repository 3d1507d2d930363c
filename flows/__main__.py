"""The one door to the flows: python -m flows NAME."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.workspaces.overrides import check_apart, parse_grid, parse_overrides, plan_cells
from stages.runtime import telemetry
from stages.runtime.errors import InputError

if TYPE_CHECKING:
    from prefect import State

    from stages.register.promotion import Decision
    from stages.register.reproduce import Reproduction

SETTINGS = {
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
}
"""Defaults that the environment may overrule; with no PREFECT_API_URL, Prefect starts a server for the run alone."""

RUNNERS = ["threads", "pool", "dask", "ray"]

policy_option = click.option("--policy", default="mlflow/promotion.yaml", help="What a version must show.")
set_option = click.option("--set", "texts", multiple=True, metavar="KEY=VALUE", help="Overrides a key of params.yaml.")
preset_option = click.option(
    "--preset", default=None, help="Of the commit's recipes/presets, in place of its params.yaml."
)
runner_option = click.option("--runner", type=click.Choice(RUNNERS), default="threads", help="Where cells run.")
jobs_option = click.option("--jobs", type=click.IntRange(1), default=1, help="Cells at once on this machine.")
address_option = click.option("--address", default=None, help="Of the cluster's scheduler.")
limit_option = click.option(
    "--limit", "limits", multiple=True, metavar="STAGE=MINUTES", help="Ends a stage that takes longer."
)


@click.group()
def main() -> None:
    """Run a flow here and now, with or without a Prefect server."""
    telemetry.switch_off()
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)


@main.command()
@set_option
@preset_option
@click.option("--commit", default=None, help="A branch, tag or hash; the folder here as it stands without it.")
@limit_option
@click.option("--register", "to_register", is_flag=True, help="Make the result a version in MLflow's registry.")
def compress(
    texts: tuple[str, ...], preset: str | None, commit: str | None, limits: tuple[str, ...], *, to_register: bool
) -> None:
    """Bring every stage up to date and record the result: here, or in a workspace of its own."""
    overrides, minutes = parse_overrides(texts), _minutes(limits)
    if commit is None and (overrides or preset):
        commit = "HEAD"
    _check(commit, [overrides], minutes, preset)

    from flows.compress import compress as flow

    _leave(flow(overrides, commit, minutes, preset=preset, to_register=to_register, return_state=True))


@main.command()
@click.option("--grid", "grids", multiple=True, required=True, metavar="KEY=VALUE,…", help="The values of a key.")
@set_option
@preset_option
@click.option("--commit", default="HEAD", help="A branch, tag or hash.")
@runner_option
@jobs_option
@address_option
@limit_option
@click.option("--best", type=click.IntRange(0), default=1, help="How many of the best become versions.")
def sweep(grids: tuple[str, ...], texts: tuple[str, ...], limits: tuple[str, ...], **given: Any) -> None:  # noqa: ANN401
    """Compress every combination of some values: one table, one plot; started again, it goes on where it stopped."""
    grid, overrides, minutes = parse_grid(grids), parse_overrides(texts), _minutes(limits)
    check_apart(grid, overrides)
    _check(given["commit"], [{**overrides, **cell} for cell in plan_cells(grid)], minutes, given["preset"])

    from flows.sweep import sweep as flow

    _leave(flow(grid, overrides, limits=minutes, return_state=True, **given))


@main.command()
@click.option("--preset", required=True, help="Of the commit's recipes/presets.")
@click.option("--seeds", default="0,1,2,3,4", help="Every row is made with each of them.")
@click.option("--rows", default=None, metavar="ROW,…", help="Some of the table's rows.")
@set_option
@click.option("--commit", default="HEAD", help="A branch, tag or hash.")
@runner_option
@jobs_option
@address_option
@limit_option
@click.option("--ablation/--no-ablation", default=True, help="Whether the number of timesteps used is varied, too.")
def compare(
    seeds: str,
    rows: str | None,
    texts: tuple[str, ...],
    limits: tuple[str, ...],
    **given: Any,  # noqa: ANN401
) -> None:
    """Make the paper's table for a preset, and how far its rows can be told apart."""
    from flows.workspaces.method_rows import parse_seeds, plan_comparison
    from flows.workspaces.repository import Base, Repository
    from stages.tools.published import METHODS

    overrides, minutes, numbers = parse_overrides(texts), _minutes(limits), parse_seeds(seeds)
    names = list(METHODS) if rows is None else rows.split(",") if rows else []
    _check(given["commit"], [], minutes, given["preset"])
    repository = Repository.find()
    base = Base(repository.resolve(given["commit"], _discard), given["preset"])
    plan_comparison(repository, base, names, numbers, overrides, ablation=given["ablation"])

    from flows.compare import compare as flow

    _leave(flow(seeds=numbers, rows=names, overrides=overrides, limits=minutes, return_state=True, **given))


@main.command()
@set_option
@click.option("--commit", default="HEAD", help="A branch, tag or hash.")
@policy_option
@limit_option
def nightly(texts: tuple[str, ...], commit: str, policy: str, limits: tuple[str, ...]) -> None:
    """Compress the current base, register the result, and promote it or say why not."""
    overrides, minutes = parse_overrides(texts), _minutes(limits)
    _check(commit, [overrides], minutes)

    from flows.nightly import nightly as flow

    _leave(flow(overrides, commit, policy, minutes, return_state=True))


@main.command()
@click.argument("name")
@click.option("--version", "uri", default=None, help="models:/NAME/3; the challenger without it.")
@policy_option
@click.option("--why", default=None, help="For the ledger.")
def promote(name: str, uri: str | None, policy: str, why: str | None) -> None:
    """Decide by the policy whether a version of the model NAME becomes its champion."""
    if _is_served():
        from flows.promotion import promote as flow

        decision = _result(flow(name, uri, policy, why, return_state=True))
    else:
        from stages.register import promotion
        from stages.register.policy import load_policy

        decision = promotion.promote(name, uri, load_policy(Path(policy)), why)
    _print_checks(decision)
    click.echo(decision.message())
    sys.exit(0 if decision.passed else 1)


@main.command()
@click.argument("name")
@policy_option
@click.option("--why", required=True, help="For the ledger.")
@click.option("--unseen", is_flag=True, help="In an emergency: do not look first whether it still draws.")
def rollback(name: str, policy: str, why: str, *, unseen: bool) -> None:
    """Make the previous champion of the model NAME the champion again."""
    if _is_served():
        from flows.promotion import rollback as flow

        decision = _result(flow(name, why, policy, unseen=unseen, return_state=True))
    else:
        from stages.register import promotion
        from stages.register.policy import load_policy

        decision = promotion.roll_back(name, None if unseen else load_policy(Path(policy)), why)
    _print_checks(decision)
    click.echo(f"{decision.uri} is the champion again, {decision.replaces} is withdrawn")


@main.command()
@click.argument("uri")
@click.option(
    "--repository",
    envvar="ESPALIER_REPOSITORY",
    help="Where to clone from; without, this checkout or the version's own remote.",
)
@click.option("--keep", "workspace", default=None, help="An empty folder for the work, which stays.")
def reproduce(uri: str, repository: str | None, workspace: str | None) -> None:
    """Do the work of a version, such as models:/NAME/3, once more, without caches, and say what comes out."""
    found: Reproduction
    if _is_served():
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


@main.command()
@click.option("--file", "path", type=Path, default=Path("prefect.yaml"), help="The deployments.")
@click.option("--pool", default=None, help="The work pool of all of them; else the one that the file names.")
def deploy(path: Path, pool: str | None) -> None:
    """Check the deployments of prefect.yaml, schedules and pools included, and hand them to the Prefect server."""
    from flows.deploy import deploy as hand_over

    hand_over(path, pool)


def _minutes(texts: tuple[str, ...]) -> dict[str, float]:
    return parse_overrides(texts, "--limit", "finetune=90")


def _check(
    commit: str | None, cells: list[dict[str, Any]], limits: dict[str, float], preset: str | None = None
) -> None:
    """Find a mistake before a server is started for it."""
    from flows.workspaces.repository import Repository
    from flows.workspaces.workspace import current_checkout

    if commit is None or (limits and Path("dvc.yaml").is_file()):
        current_checkout().check_limits(limits)
    if commit is not None:
        repository = Repository.find()
        repository.render(repository.resolve(commit, _discard), cells, preset)


def _discard(_line: str) -> None:
    """The flow will say it."""


def _is_served() -> bool:
    """Whether a Prefect server could show the run; without one, an act on the registry needs none of its own."""
    from prefect.settings import PREFECT_API_URL

    return bool(PREFECT_API_URL.value())


def _result(state: "State[Any]") -> Any:  # noqa: ANN401
    """Give what a flow found.

    Raises:
        InputError: It failed.
    """
    if state.data is None:
        raise InputError(state.message or f"it ended as {state.name}")
    return state.result(raise_on_failure=False)


def _leave(state: "State[Any]") -> None:
    click.echo(f"{state.name}: {state.message}")
    sys.exit(0 if state.is_completed() and state.name == "Completed" else 1)


def _print_checks(decision: "Decision") -> None:
    for check in decision.checks:
        mark = click.style("✓", fg="green") if check.passed else click.style("✗", fg="red")
        click.echo(f"{mark} {check.name}: {check.reason}")


if __name__ == "__main__":
    main()
