"""An evaluation -> its record, as JSON, CSV and PNG."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from stages.data.grid import write_grid
from stages.evaluate.evaluation import Evaluation
from stages.evaluate.summary import flat_metrics, summarise
from stages.protocol.evaluation import DENSE, Cost
from stages.storage.files import write_atomically, write_json


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """Write what was found, for people and other programs.

    evaluation.json is the whole record, metrics/MODEL.json what DVC and MLflow show, costs.csv the truth table of
    speed, pairs.csv every pair; a grid, a strip and the worst pairs of each model are PNG.
    """
    record = summarise(evaluation)
    write_json(folder / "evaluation.json", record.model_dump(mode="json"))
    rows = (cost.model_dump().values() for cost in record.costs)
    _write_csv(folder / "costs.csv", list(Cost.model_fields), rows)
    _write_csv(folder / "pairs.csv", ("model", "set", "index", "ssim", "mse"), _pairs(evaluation))
    for name, measured in evaluation.models.items():
        write_json(folder / "metrics" / f"{name}.json", flat_metrics(record, name))
        write_grid(measured.shown, folder / f"{name}.png")
        write_grid(np.concatenate(list(measured.strip)), folder / f"{name}-strip.png", measured.strip.shape[1])
        if name != DENSE:
            write_grid(np.concatenate(list(measured.worst)), folder / f"{name}-worst.png", measured.worst.shape[1])


def _pairs(evaluation: Evaluation) -> Iterable[Sequence[object]]:
    for name, measured in evaluation.models.items():
        if name != DENSE:
            for place, ssim in np.ndenumerate(measured.pairs.ssim):
                yield (name, *place, f"{ssim:.6f}", f"{measured.pairs.mse[place]:.8f}")


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())
