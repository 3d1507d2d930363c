"""The command doctor: whether this machine, its storage and its servers are ready."""

import sys

import click

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
def doctor() -> None:
    """Check what a run needs: packages, device, disk, params.yaml, weights, Git, and the servers that are set.

    Nothing is changed, and no server is waited for longer than half a minute. Each line is ok, warn (it runs, but read
    the line) or fail (it would end a run), with what to do. The exit code is 1 only if a line says fail.
    """
    from flows.doctor.checks import CHECKS, run_check

    failed = 0
    for name, check in CHECKS.items():
        for status, text in run_check(check):
            failed += status == "fail"
            click.echo(f"{click.style(f'{status:<4}', fg=COLOURS[status])}  {name:<10}  {text}")
    sys.exit(1 if failed else 0)
