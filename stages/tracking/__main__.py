"""Record the finished compression in MLflow."""

from pathlib import Path

import click

from stages.runtime.result import write_result
from stages.tracking.compression import Compression
from stages.tracking.recording import record_all


@click.command()
@click.option("--artifacts", type=Path, default=Path("artifacts"), help="Folder of model folders.")
@click.option("--reports", type=Path, default=Path("reports"), help="Folder of report folders.")
@click.option("--unsent", type=Path, default=Path("unsent"), help="Folder of records that have not reached MLflow yet.")
@click.option("--allow-offline", is_flag=True, help="Warn if MLflow does not answer, in place of failing.")
def main(artifacts: Path, reports: Path, unsent: Path, *, allow_offline: bool) -> None:
    """Record the finished compression as one MLflow run, and send all records saved before."""
    recorded = record_all(Compression(artifacts, reports), unsent, allow_offline=allow_offline)
    if recorded:
        run_id, new = recorded
        write_result(mlflow_run=run_id, new=new)


if __name__ == "__main__":
    main()
