"""A recovery -> its curve, metrics, cost and pictures as files."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stages.data.grid import write_grid
from stages.finetune.curve import CurvePoint
from stages.storage.files import write_atomically, write_json


def write_report(curve: Sequence[CurvePoint], samples: Mapping[int, NDArray[np.uint8]], folder: Path) -> None:
    """Write curve.csv, metrics.json and, where pictures were drawn, samples.png with a row for each time."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", *curve[0].values()])
    writer.writerows([point.step, *point.values().values()] for point in curve)
    write_atomically(folder / "curve.csv", text.getvalue().encode())
    first, last = curve[0].heldout_loss, curve[-1]
    losses = {"pruned": first, "finetuned": last.heldout_loss}
    write_json(folder / "metrics.json", {"heldout_loss": losses, "ema_decay": last.ema_decay})
    if samples:
        rows = [samples[step] for step in sorted(samples)]
        write_grid(np.concatenate(rows), folder / "samples.png", columns=len(rows[0]))
