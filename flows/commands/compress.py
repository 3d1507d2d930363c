"""The command compress: every stage brought up to date as a Prefect flow, here or in a workspace."""

import click

from flows import options
from stages.runtime.imports import importing


@click.command()
@options.set_option
@options.preset_option
@click.option(
    "--commit",
    default=None,
    help="A branch, tag or hash; by default HEAD with --set or --preset, else the current folder as it stands.",
)
@options.limit_option
@click.option("--register", "to_register", is_flag=True, help="Make the result a version in MLflow's registry.")
def compress(
    texts: tuple[str, ...], preset: str | None, commit: str | None, limits: tuple[str, ...], *, to_register: bool
) -> None:
    """Bring every stage up to date and record the result, in the current folder or in a workspace of its own."""
    with importing():
        from flows.entry import exit_by_state, find_source
        from flows.tasks.temporary_server import ensure_server
        from flows.workspaces.overrides import parse_limits, parse_overrides

    overrides, minutes = parse_overrides(texts), parse_limits(limits)
    if commit is None and (overrides or preset is not None):
        commit = "HEAD"
    if commit is None:
        from flows.workspaces.workspace import current_checkout

        current_checkout().check_limits(minutes)
    else:
        repository, source = find_source(commit, preset, minutes)
        repository.render(source, [overrides])

    ensure_server()
    with importing():
        from flows.compress import compress as flow

    exit_by_state(flow(overrides, commit, minutes, preset=preset, to_register=to_register, return_state=True))
