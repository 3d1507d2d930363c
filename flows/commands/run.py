"""The commands run and repro: the stages of dvc.yaml in the current folder, without Prefect."""

import sys
from pathlib import Path

import click

SUMMARY, PAGE = Path("reports/summary"), Path("reports/index.html")
NO_SCM = "[core]\n    no_scm = true\n"
"""What DVC needs to run outside of a Git repository."""


def log(line: str) -> None:
    """Print a line beside the output."""
    click.echo(line, err=True)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(arguments: tuple[str, ...]) -> None:
    """Bring every stage of dvc.yaml up to date in the current folder, then print the results and where the page is.

    ARGUMENTS are those of `dvc repro`, such as the name of a stage: it and the stages that it needs are run then.

    A stage whose code, params and inputs are as before is not computed again, and an interrupted training goes on from
    its last checkpoint. params.yaml is checked first. No Prefect is involved.
    """
    from flows.workspaces.running import run_stages
    from stages.params import load_params
    from stages.report.templates import WORDS
    from stages.storage.files import read_json

    load_params(Path("params.yaml"))
    allow_no_git(Path())
    if code := run_stages(arguments):
        sys.exit(code)
    if not arguments:  # otherwise the results may be those of an earlier run
        verdict, results = read_json(SUMMARY / "verdict.json"), (SUMMARY / "results.md").read_text()
        click.echo(f"{WORDS[verdict['level']]}. {verdict['sentence']}\n")
        click.echo(results.partition("\n\n")[2], nl=False)  # without the verdict, which stands there in bold
        click.echo(f"Look at it: {PAGE}")


def allow_no_git(folder: Path) -> None:
    """Let DVC run its stages in a folder that is no Git repository, such as an unpacked archive, and warn.

    A .dvc/config.local with other settings stays as it is; one with this setting alone goes once there is a repository.
    """
    settings, place = folder / ".dvc/config.local", folder.resolve()
    if any((it / ".git").exists() for it in (place, *place.parents)):
        if settings.is_file() and settings.read_text() == NO_SCM:
            settings.unlink()
        return
    if settings.exists() or not settings.parent.is_dir():
        return
    settings.write_text(NO_SCM)
    need = "flows on commits and the registry need one (git clone, or git init and a commit)"
    log(f"This folder is no Git repository: the stages run, but {need}.")


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def repro(arguments: tuple[str, ...]) -> None:
    """Run `dvc repro ARGUMENTS` in the current folder, after other runs in it have ended; no Prefect is involved."""
    from flows.workspaces.checkout import run_dvc_repro

    run_dvc_repro(arguments, log)
