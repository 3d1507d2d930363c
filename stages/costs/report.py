"""The costs of the models -> costs.json, costs.csv and metrics.json."""

from pathlib import Path

import pandas as pd

from stages.protocol.costs import CostsRecord
from stages.storage.files import write_csv, write_json


def write_report(record: CostsRecord, folder: Path) -> None:
    """Write the record, its rows as CSV, and as metrics for DVC and MLflow the first row of each model."""
    write_json(folder / "costs.json", record.model_dump(mode="json"))
    write_csv(folder / "costs.csv", pd.DataFrame([cost.model_dump() for cost in record.costs]))
    firsts = {name: record.first(name) for name in record.weights_sha256}
    metrics = {name: {"latency_ms": first.median_ms, "speed_up": first.speed_up} for name, first in firsts.items()}
    write_json(folder / "metrics.json", metrics)
