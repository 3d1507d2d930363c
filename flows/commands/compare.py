"""The command compare: the paper's table of methods, or the curves of recipes of recovery."""

from typing import Any

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
def compare(
    *,
    is_curve: bool,
    seeds: str,
    rows: str | None,
    texts: tuple[str, ...],
    limits: tuple[str, ...],
    ablation: bool | None,
    steps: str | None,
    recipes: tuple[str, ...],
    **given: Any,  # noqa: ANN401
) -> None:
    """Make the paper's table for a preset, or the curves of its recovery, with intervals over the seeds."""
    if is_curve and ablation:
        raise InputError("--curve has no ablation; leave --ablation out")
    if not is_curve and (steps is not None or recipes):
        raise InputError("--steps and --recipe choose what --curve measures; add --curve")
    with importing():
        from flows.entry import exit_by_state, find_source
        from flows.tasks.temporary_server import ensure_server
        from flows.workspaces.method_rows import parse_seeds, plan_comparison
        from flows.workspaces.overrides import parse_limits, parse_overrides
        from flows.workspaces.recipe_rows import parse_recipes, parse_steps, plan_curve
        from stages.tools.comparison.published import METHODS

    given |= {"overrides": parse_overrides(texts), "limits": parse_limits(limits), "seeds": parse_seeds(seeds)}
    names = rows.split(",") if rows else [] if rows == "" else None
    if is_curve:
        given |= {"recipes": parse_recipes(recipes), "steps": parse_steps(steps) if steps is not None else None}
    else:
        names, given["ablation"] = list(METHODS) if names is None else names, ablation is not False
    source = find_source(given["commit"], given["preset"], given["limits"])
    if is_curve:
        plan_curve(*source, names, given["seeds"], given["steps"], given["recipes"], given["overrides"])
    else:
        plan_comparison(*source, names or [], given["seeds"], given["overrides"], ablation=given["ablation"])

    ensure_server()
    with importing():
        from flows.compare import compare as methods
        from flows.curve import curve

    flow: Any = curve if is_curve else methods
    exit_by_state(flow(rows=names, return_state=True, **given))
