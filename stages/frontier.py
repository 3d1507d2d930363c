"""The finished cells of a sweep -> their table and plot."""

from pathlib import Path

import click


@click.command()
@click.option("--cells", type=Path, required=True, help="A folder with a folder for each finished cell.")
@click.option("--out", type=Path, required=True, help="Where table and plot go.")
def main(cells: Path, out: Path) -> None:
    """Compare the finished cells of a sweep, all measured by one protocol."""
    from stages.report.frontier import write_frontier

    write_frontier(cells, out)
    click.echo((out / "table.md").read_text(), nl=False)


if __name__ == "__main__":
    main()
