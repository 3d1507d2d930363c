"""A recovery curve -> curve.csv and metrics.json."""

import csv
import io
from dataclasses import asdict, fields
from pathlib import Path

from stages.artifacts import write_atomically, write_json
from stages.finetune.checkpoint import CurvePoint


def write_report(curve: list[CurvePoint], folder: Path) -> None:
    """Write the curve, one row a measurement, and its first and last held-out loss."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(CurvePoint)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(point) for point in curve)
    write_atomically(folder / "curve.csv", text.getvalue().encode())
    first, last = curve[0].heldout_loss, curve[-1].heldout_loss
    write_json(folder / "metrics.json", {"heldout_loss": {"pruned": first, "finetuned": last}})
