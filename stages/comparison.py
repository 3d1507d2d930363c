"""The finished cells of a comparison -> the paper's table, measured by one protocol with several seeds."""

from pathlib import Path

import click


@click.command()
@click.option("--cells", type=Path, required=True, help="A folder with a folder for each finished cell.")
@click.option("--out", type=Path, required=True, help="Where table and plots go.")
@click.option("--preset", required=True, help="The system, for what was published of it.")
@click.option("--command", default="", help="What made the cells, for the table.")
def main(cells: Path, out: Path, preset: str, command: str) -> None:
    """Compare methods over several seeds, pairing them seed by seed."""
    from stages.report.comparison import write_comparison

    write_comparison(cells, out, preset, command)
    click.echo((out / "table.md").read_text(), nl=False)


if __name__ == "__main__":
    main()
