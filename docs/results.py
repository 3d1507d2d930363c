"""The report's results -> the table and the picture in README.md."""

import shutil
from pathlib import Path

import click

from stages.runtime.errors import InputError

BEGIN, END = "<!-- results: written by `make results` -->\n", "<!-- end of results -->"


@click.command()
@click.option("--report", type=Path, default=Path("reports/summary"), help="Output folder of the stage report.")
@click.option("--readme", type=Path, default=Path("README.md"), help="File that holds the table.")
@click.option("--picture", type=Path, default=Path("docs/summary.png"), help="The README's picture.")
def main(report: Path, readme: Path, picture: Path) -> None:
    """Replace the README's picture and the table between its two marks."""
    if not (report / "results.md").is_file():
        raise InputError(f"{report / 'results.md'} does not exist; write it with: make run")
    before, begin, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise InputError(f"{readme} lacks the marks {BEGIN.strip()} and {END}; add both")
    readme.write_text(f"{before}{BEGIN}\n{(report / 'results.md').read_text()}\n{END}{after}")
    shutil.copyfile(report / "summary.png", picture)


if __name__ == "__main__":
    main()
