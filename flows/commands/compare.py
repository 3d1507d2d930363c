"""The command compare: the paper's table of methods, or the curves of recipes of recovery."""

from typing import Any, NoReturn

import click

from flows import options
from stages.runtime.errors import InputError
from stages.runtime.imports import importing


@click.command()
@click.option("--preset", required=True, help="A preset of the commit (recipes/presets).")
@click.option("--seeds", default="0,1,2,3,4", help="Each row has one cell per seed.")
@click.option("--rows", default=None, metavar="ROW,…", help="Rows of the table; by default all.")
@options.set_option
@options.commit_option
@options.runner_option
@options.jobs_option
@options.limit_option
@click.option("--ablation/--no-ablation", default=None, help="Whether to vary the number of timesteps as well (yes).")
@click.option("--curve", "is_curve", is_flag=True, help="Compare what recovery costs by several recipes instead.")
@click.option("--steps", default=None, metavar="STEP,…", help="With --curve: where each training is measured.")
@click.option("--recipe", "recipes", multiple=True, metavar="NAME={KEY: VALUE}", help="With --curve: one row more.")
def compare(*, is_curve: bool, **given: Any) -> None:  # noqa: ANN401
    """Make the paper's table for a preset, or the curves of its recovery, with intervals over the seeds."""
    steps, recipes, ablation = (given.pop(name) for name in ("steps", "recipes", "ablation"))
    if is_curve and ablation:
        raise InputError("--curve has no ablation; leave --ablation out")
    if is_curve:
        _compare_recipes(steps=steps, recipes=recipes, **given)
    if steps is not None or recipes:
        raise InputError("--steps and --recipe choose what --curve measures; add --curve")
    _compare_methods(ablation=ablation is not False, **given)


def _compare_methods(
    *,
    seeds: str,
    rows: str | None,
    texts: tuple[str, ...],
    limits: tuple[str, ...],
    **given: Any,  # noqa: ANN401
) -> NoReturn:
    """Run the flow compare, and end this process."""
    with importing():
        from flows.entry import exit_by_state, find_source
        from flows.tasks.temporary_server import ensure_server
        from flows.workspaces.method_rows import parse_seeds, plan_comparison
        from flows.workspaces.overrides import parse_limits, parse_overrides
        from stages.tools.comparison.published import METHODS

    overrides, minutes, numbers = parse_overrides(texts), parse_limits(limits), parse_seeds(seeds)
    names = list(METHODS) if rows is None else rows.split(",") if rows else []
    source = find_source(given["commit"], given["preset"], minutes)
    plan_comparison(*source, names, numbers, overrides, ablation=given["ablation"])

    ensure_server()
    with importing():
        from flows.compare import compare as flow

    exit_by_state(flow(seeds=numbers, rows=names, overrides=overrides, limits=minutes, return_state=True, **given))


def _compare_recipes(
    *,
    seeds: str,
    rows: str | None,
    texts: tuple[str, ...],
    limits: tuple[str, ...],
    steps: str | None,
    recipes: tuple[str, ...],
    **given: Any,  # noqa: ANN401
) -> NoReturn:
    """Run the flow curve, and end this process."""
    with importing():
        from flows.entry import exit_by_state, find_source
        from flows.tasks.temporary_server import ensure_server
        from flows.workspaces.method_rows import parse_seeds
        from flows.workspaces.overrides import parse_limits, parse_overrides
        from flows.workspaces.recipe_rows import parse_recipes, parse_steps, plan_curve

    overrides, minutes, numbers = parse_overrides(texts), parse_limits(limits), parse_seeds(seeds)
    names, added = rows.split(",") if rows is not None else None, parse_recipes(recipes)
    given["steps"] = parse_steps(steps) if steps is not None else None
    source = find_source(given["commit"], given["preset"], minutes)
    plan_curve(*source, names, numbers, given["steps"], added, overrides)

    ensure_server()
    with importing():
        from flows.curve import curve as flow

    given |= {"overrides": overrides, "limits": minutes, "return_state": True}
    exit_by_state(flow(seeds=numbers, rows=names, recipes=added, **given))
