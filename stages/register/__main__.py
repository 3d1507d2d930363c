"""Register the finished compression as a version of a model."""

from pathlib import Path

import click


@click.command()
@click.option("--name", default=None, help="Of the model in the registry; espalier-BASE without it.")
@click.option("--unsent", type=Path, default=Path("unsent"), help="Where records wait for the server.")
def main(name: str | None, unsent: Path) -> None:
    """Register the compression that the pipeline here has finished as the challenger, however often this is called."""
    from stages.register.register import register
    from stages.runtime.result import write_result
    from stages.tracking.compression import Compression

    version, new = register(Compression(Path("artifacts"), Path("reports")), unsent, name)
    write_result(uri=f"models:/{version.name}/{version.version}", new=new)
    done = "registered" if new else "was registered before"
    click.echo(
        f"models:/{version.name}/{version.version} {done}; decide on it with: python -m flows promote {version.name}"
    )


if __name__ == "__main__":
    main()
