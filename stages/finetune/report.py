"""A recovery -> its curve, metrics, cost and samples as files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stages.data.grid import write_grid
from stages.finetune.curve import CurvePoint
from stages.storage.files import write_csv, write_json


def write_report(curve: Sequence[CurvePoint], samples: Mapping[int, NDArray[np.uint8]], folder: Path) -> None:
    """Write curve.csv, metrics.json and, if there are samples, samples.png with one row per step."""
    write_csv(folder / "curve.csv", pd.DataFrame([{"step": point.step, **point.values()} for point in curve]))
    first, last = curve[0].heldout_loss, curve[-1]
    losses = {"pruned": first, "finetuned": last.heldout_loss}
    write_json(folder / "metrics.json", {"heldout_loss": losses, "ema_decay": last.ema_decay})
    if samples:
        rows = [samples[step] for step in sorted(samples)]
        write_grid(np.concatenate(rows), folder / "samples.png", columns=len(rows[0]))
