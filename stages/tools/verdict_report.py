"""The command report: what a finished compression achieved, for a terminal or a pull request."""

from pathlib import Path

import click

COLOURS = {"good": "green", "changed": "yellow", "worse": "red"}
PAGE = "index.html"


@click.command()
@click.option("--markdown", is_flag=True, help="Write Markdown, for the comment of a pull request.")
@click.option("--against", metavar="COMMIT", help="Compare with the reports that dvc.lock names at this commit.")
@click.option("--reports", type=Path, default=Path("reports"), show_default=True, help="Folder of the reports.")
@click.option(
    "--policy", type=Path, default=Path("mlflow/promotion.yaml"), show_default=True, help="The promotion policy."
)
def report(*, markdown: bool, against: str | None, reports: Path, policy: Path) -> None:
    """Print the verdict on the finished compression, its table, worst pairs, and whether the gate's limits are met."""
    # The command line imports nothing heavy before a command runs.
    from stages.report.templates import WORDS  # noqa: PLC0415
    from stages.tools.report_text import (  # noqa: PLC0415
        read_reports,
        write_comparison,
        write_markdown,
        write_plain,
    )

    found = read_reports(reports)
    comparison = write_comparison(found, against) if against else ""
    if markdown:
        click.echo(write_markdown(found, comparison, policy))
        return
    rest, verdict = write_plain(found, comparison, policy), found.verdict
    word = click.style(f"{WORDS[verdict.level]}.", fg=COLOURS[verdict.level], bold=True)
    click.echo(f"{word} {verdict.sentence}\n\n{rest}")
    if (reports / PAGE).is_file():
        click.echo(f"\nPage: {reports / PAGE}")
