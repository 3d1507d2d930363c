"""An evaluation -> JSON, CSV and PNG files."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from stages.data.grid import write_grid
from stages.evaluate.evaluation import Evaluation
from stages.evaluate.summary import flat_metrics, summarise
from stages.protocol.evaluation import DENSE, SNAPSHOT
from stages.storage.files import write_csv, write_json


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """Write evaluation.json, metrics/MODEL.json, pairs.csv, and a grid, a strip and the worst pairs of each model.

    metrics/MODEL.json is for DVC and MLflow. Snapshots have only numbers, in snapshots.json.
    """
    evaluation = _split_snapshots(evaluation, folder)
    record = summarise(evaluation)
    write_json(folder / "evaluation.json", record.model_dump(mode="json"))
    pairs = pd.DataFrame(_pairs(evaluation), columns=["model", "set", "index", "ssim", "mse"])
    write_csv(folder / "pairs.csv", pairs)
    for name, measured in evaluation.models.items():
        write_json(folder / "metrics" / f"{name}.json", flat_metrics(record, name))
        write_grid(measured.shown, folder / f"{name}.png")
        write_grid(np.concatenate(list(measured.strip)), folder / f"{name}-strip.png", measured.strip.shape[1])
        if name != DENSE:
            write_grid(np.concatenate(list(measured.worst)), folder / f"{name}-worst.png", measured.worst.shape[1])


def _split_snapshots(evaluation: Evaluation, folder: Path) -> Evaluation:
    """Write the record of the snapshots, if there are any, and return the evaluation of the other models."""
    snapshots = {name: it for name, it in evaluation.models.items() if name.startswith(SNAPSHOT)}
    others = {name: it for name, it in evaluation.models.items() if name not in snapshots}
    if snapshots:
        record = summarise(replace(evaluation, models={DENSE: others[DENSE], **snapshots}))
        write_json(folder / "snapshots.json", record.model_dump(mode="json"))
    return replace(evaluation, models=others)


def _pairs(evaluation: Evaluation) -> Iterable[Sequence[object]]:
    for name, measured in evaluation.models.items():
        if name != DENSE:
            for place, ssim in np.ndenumerate(measured.pairs.ssim):
                yield (name, *place, f"{ssim:.6f}", f"{measured.pairs.mse[place]:.8f}")
