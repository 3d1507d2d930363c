"""The costs of the models -> costs.json, costs.csv and metrics.json."""

from pathlib import Path

import pandas as pd

from stages.protocol.costs import Cost, CostsRecord
from stages.storage.files import write_csv, write_json


def write_report(record: CostsRecord, folder: Path) -> None:
    """Write the record, its rows as CSV, and as metrics for DVC and MLflow the first row of each model."""
    write_json(folder / "costs.json", record.model_dump(mode="json"))
    write_csv(folder / "costs.csv", pd.DataFrame([cost.model_dump() for cost in record.costs]))
    firsts = {name: record.first(name) for name in record.weights_sha256}
    write_json(folder / "metrics.json", {name: _metrics(first) for name, first in firsts.items()})


def _metrics(first: Cost) -> dict[str, float | None]:
    """Return the metrics of a row; energy is among them only where it was measured."""
    found = {"latency_ms": first.median_ms, "speed_up": first.speed_up}
    return found if first.joules_per_image is None else found | {"joules_per_image": first.joules_per_image}
