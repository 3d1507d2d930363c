"""The commands of Prefect's server: server, deploy, start."""

from pathlib import Path

import click

from flows import options


@click.command()
def server() -> None:
    """Start Prefect's server: with a password, closed to other web pages, and on loopback."""
    from flows.server import start_server

    start_server()


@click.command()
@click.option("--file", "path", type=Path, default=Path("prefect.yaml"), help="The file of deployments.")
@click.option("--pool", default=None, help="Work pool of the deployments for which the file names none.")
@click.option("--schedules", is_flag=True, help="Switch the schedules of the file on; without it, new ones are paused.")
def deploy(path: Path, pool: str | None, *, schedules: bool) -> None:
    """Check the deployments of prefect.yaml, schedules and pools included, and create them on the Prefect server.

    Schedules are created paused: nothing runs by itself until --schedules, or a switch on Prefect's page, turns them
    on. One that is on already stays on.
    """
    from flows.tasks.server import load_settings

    load_settings()
    from flows.deploy import deploy as create_deployments

    create_deployments(path, pool, with_schedules=schedules)


@click.command()
@click.argument("name")
@options.set_option
@click.option("--param", "params", multiple=True, metavar="NAME=VALUE", help="A parameter of the flow, such as why.")
@click.option("--wait", is_flag=True, help="Follow the run to its end; exit code 0 only if it completed.")
def start(name: str, texts: tuple[str, ...], params: tuple[str, ...], *, wait: bool) -> None:
    """Start the deployment NAME on the Prefect server now, and print the address of the run's page.

    NAME is one that `espalier deploy` prints, such as compress, or FLOW/NAME where several flows have the same. A
    worker of the deployment's pool does the work.
    """
    from flows.tasks.server import load_settings
    from flows.workspaces.overrides import parse_overrides, parse_pairs

    overrides, given = parse_overrides(texts), dict(parse_pairs(params, "--param", 'why="draws sevens as ones"'))
    load_settings()
    from flows.start import follow, start_deployment

    run = start_deployment(name, overrides, given)
    if wait:
        follow(run)
