"""Record the finished compression in MLflow."""

from pathlib import Path

import click

from stages.runtime.result import write_result
from stages.tracking.compression import Compression
from stages.tracking.recording import record_all


@click.command()
@click.option("--artifacts", type=Path, default=Path("artifacts"), help="The model folders.")
@click.option("--reports", type=Path, default=Path("reports"), help="The report folders.")
@click.option("--unsent", type=Path, default=Path("unsent"), help="Where records wait for the server.")
@click.option("--allow-offline", is_flag=True, help="Only warn when MLflow cannot be reached.")
def main(artifacts: Path, reports: Path, unsent: Path, *, allow_offline: bool) -> None:
    """Record the finished compression as one MLflow run, however often this is called, and all that still wait."""
    recorded = record_all(Compression(artifacts, reports), unsent, allow_offline=allow_offline)
    if recorded:
        run_id, new = recorded
        write_result(mlflow_run=run_id, new=new)


if __name__ == "__main__":
    main()
