"""Register the finished compression as a version of a model."""

from pathlib import Path

import click


@click.command()
@click.option("--name", default=None, help="Of the model in the registry; espalier-BASE without it.")
@click.option("--artifacts", type=Path, default=Path("artifacts"), help="The model folders.")
@click.option("--reports", type=Path, default=Path("reports"), help="The report folders.")
@click.option("--unsent", type=Path, default=Path("unsent"), help="Where records wait for the server.")
def main(name: str | None, artifacts: Path, reports: Path, unsent: Path) -> None:
    """Register the finished compression as the challenger, however often this is called."""
    from stages.compression import Compression
    from stages.register.register import register

    version, new = register(Compression(artifacts, reports), unsent, name)
    done = "registered" if new else "was registered before"
    click.echo(
        f"models:/{version.name}/{version.version} {done}; decide on it with: python -m flows promote {version.name}"
    )


if __name__ == "__main__":
    main()
