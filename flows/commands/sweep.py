"""The command sweep: every combination of some values of params.yaml."""

from typing import Any

import click

from flows import options
from stages.runtime.imports import importing


@click.command()
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
    with importing():
        from flows.entry import exit_by_state, find_source
        from flows.tasks.temporary_server import ensure_server
        from flows.workspaces.grid import check_grid, plan_sweep
        from flows.workspaces.overrides import parse_grid, parse_limits, parse_overrides

    grid, overrides, minutes = parse_grid(grids), parse_overrides(texts), parse_limits(limits)
    check_grid(grid, overrides)
    plan_sweep(*find_source(given["commit"], given["preset"], minutes), grid, overrides)

    ensure_server()
    with importing():
        from flows.sweep import sweep as flow

    exit_by_state(flow(grid, overrides, limits=minutes, return_state=True, **given))
