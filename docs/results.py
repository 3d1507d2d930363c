"""The pipeline's results table -> its place in README.md."""

from pathlib import Path

import click

from stages.errors import InputError

BEGIN, END = "<!-- results: written by `make results` -->\n", "<!-- end of results -->"


@click.command()
@click.option("--results", type=Path, default=Path("reports/evaluate/results.md"), help="The table.")
@click.option("--readme", type=Path, default=Path("README.md"), help="The file to put it into.")
def main(results: Path, readme: Path) -> None:
    """Replace the table between the two marks in the README."""
    if not results.is_file():
        raise InputError(f"{results} does not exist; make it with: make run")
    before, found, rest = readme.read_text().partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise InputError(f"{readme} lacks the marks {BEGIN.strip()} and {END}")
    readme.write_text(f"{before}{BEGIN}\n{results.read_text()}\n{END}{after}")


if __name__ == "__main__":
    main()
