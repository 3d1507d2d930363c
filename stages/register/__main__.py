"""Register the finished compression as a version of a model."""

from pathlib import Path

import click


@click.command()
@click.option("--name", default=None, help="Name of the model in the registry; by default espalier-BASE.")
@click.option("--unsent", type=Path, default=Path("unsent"), help="Folder of records that have not reached MLflow yet.")
def main(name: str | None, unsent: Path) -> None:
    """Register the finished compression of this folder as the challenger; a second call finds the same version."""
    from stages.register.register import register
    from stages.register.registry import uri_of
    from stages.runtime.result import write_result
    from stages.tracking.compression import Compression

    version, new = register(Compression(Path("artifacts"), Path("reports")), unsent, name)
    write_result(uri=uri_of(version), new=new)
    done = "registered" if new else "was registered before"
    click.echo(f"{uri_of(version)} {done}; decide on it with: espalier promote {version.name}")


if __name__ == "__main__":
    main()
