"""An evaluation -> its record, as JSON, CSV and PNG."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from stages.artifacts import write_atomically, write_json
from stages.evaluate.evaluation import DENSE, Evaluation
from stages.evaluate.pictures import COLUMNS, ROWS, write_grid
from stages.evaluate.summary import NUM_WORST, flat_metrics, summarise


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """Write what was found, for people and other programs.

    evaluation.json is the whole record, metrics/MODEL.json what DVC and MLflow show, costs.csv the truth table of
    speed, pairs.csv every pair; a grid, a strip and the worst pairs of each model are PNG.
    """
    summary = summarise(evaluation)
    write_json(folder / "evaluation.json", summary)
    write_json(folder / "protocol.json", summary["protocol"])
    _write_csv(folder / "costs.csv", list(summary["costs"][0]), (row.values() for row in summary["costs"]))
    _write_csv(folder / "pairs.csv", ("model", "set", "index", "ssim", "mse"), _pairs(evaluation))
    for name, measured in evaluation.models.items():
        write_json(folder / "metrics" / f"{name}.json", flat_metrics(summary, name))
        write_grid(measured.samples[0, : ROWS * COLUMNS], folder / f"{name}.png")
        write_grid(np.concatenate(list(measured.strip)), folder / f"{name}-strip.png", measured.strip.shape[1])
        if name != DENSE:
            worst = measured.pairs.worst(NUM_WORST)
            pairs = [model.samples[at] for model in (evaluation.models[DENSE], measured) for at in worst]
            write_grid(np.stack(pairs), folder / f"{name}-worst.png", len(worst))


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
