"""The pipeline's results -> the table and the picture in README.md."""

import shutil
from pathlib import Path

import click

from stages.runtime.errors import InputError

BEGIN, END = "<!-- results: written by `make results` -->\n", "<!-- end of results -->"


@click.command()
@click.option("--report", type=Path, default=Path("reports/summary"), help="What report wrote.")
@click.option("--readme", type=Path, default=Path("README.md"), help="The file to put the table into.")
@click.option("--picture", type=Path, default=Path("docs/summary.png"), help="Where the README's picture lies.")
def main(report: Path, readme: Path, picture: Path) -> None:
    """Replace the table between the two marks in the README, and its picture."""
    if not (report / "results.md").is_file():
        raise InputError(f"{report / 'results.md'} does not exist; make it with: make run")
    before, found, rest = readme.read_text().partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise InputError(f"{readme} lacks the marks {BEGIN.strip()} and {END}")
    readme.write_text(f"{before}{BEGIN}\n{(report / 'results.md').read_text()}\n{END}{after}")
    shutil.copyfile(report / "summary.png", picture)


if __name__ == "__main__":
    main()
