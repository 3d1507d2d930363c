"""The command nightly: compress, register, and promote or report why not."""

import click

from flows import options
from stages.runtime.imports import importing


@click.command()
@options.set_option
@options.commit_option
@options.policy_option
@options.limit_option
def nightly(texts: tuple[str, ...], commit: str, policy: str, limits: tuple[str, ...]) -> None:
    """Compress the current base, register the result, and promote it or report why not."""
    with importing():
        from flows.entry import exit_by_state, find_source
        from flows.tasks.temporary_server import ensure_server
        from flows.workspaces.overrides import parse_limits, parse_overrides

    overrides, minutes = parse_overrides(texts), parse_limits(limits)
    repository, source = find_source(commit, None, minutes)
    repository.render(source, [overrides])

    ensure_server()
    with importing():
        from flows.nightly import nightly as flow

    exit_by_state(flow(overrides, commit, policy, minutes, return_state=True))
