"""Record the finished compression in MLflow."""

from pathlib import Path

import click

from stages.runtime.errors import InputError, UnavailableError, first_line
from stages.tracking.compression import Compression
from stages.tracking.mlflow_client import connect
from stages.tracking.recording import RECORD, find_run, save_record, send_record


@click.command()
@click.option("--artifacts", type=Path, default=Path("artifacts"), help="The model folders.")
@click.option("--reports", type=Path, default=Path("reports"), help="The report folders.")
@click.option("--unsent", type=Path, default=Path("unsent"), help="Where records wait for the server.")
@click.option("--allow-offline", is_flag=True, help="Only warn when MLflow cannot be reached.")
def main(artifacts: Path, reports: Path, unsent: Path, *, allow_offline: bool) -> None:
    """Record the finished compression as one MLflow run, however often this is called, and all that still wait."""
    compression = Compression(artifacts, reports)
    waiting = sorted(path.parent for path in unsent.glob(f"*/{RECORD}") if path.parent.name[0] != ".")
    try:
        known = None if waiting else find_run(connect(), compression.id())
    except Exception as error:  # noqa: BLE001  # any fault of a server; one of the folders is told of by `keep`
        _tell_of_waiting(save_record(compression, unsent), error, allow_offline=allow_offline)
        return
    if known:
        click.echo(f"MLflow run {known}: this compression was recorded before")
        return
    latest = save_record(compression, unsent)
    for folder in [latest, *(other for other in waiting if other != latest)]:
        try:
            run_id, new = send_record(folder)
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001  # any fault of a server
            _tell_of_waiting(folder, error, allow_offline=allow_offline)
            return
        click.echo(f"MLflow run {run_id}: {'recorded' if new else 'this compression was recorded before'}")


def _tell_of_waiting(folder: Path, error: Exception, *, allow_offline: bool) -> None:
    message = (
        f"MLflow did not take the record ({first_line(error)}); it is kept in {folder} and goes with the next one, or "
        "by: python -m stages.tracking"
    )
    if not allow_offline:
        raise UnavailableError(message) from None
    click.echo(f"Warning: {message}", err=True)


if __name__ == "__main__":
    main()
