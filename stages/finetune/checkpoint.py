"""A training in progress <-> safetensors files of which the newest whole one is found again."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from stages.artifacts import read_metadata, read_tensors, write_tensors
from stages.errors import InputError

KEEP_LAST = 2


@dataclass(frozen=True)
class CurvePoint:
    """One row of the recovery curve."""

    step: int
    train_loss: float | None
    """Mean over the steps since the row before; None before the first step."""
    heldout_loss: float
    """Of the EMA weights, under noise and timesteps that never change."""


@dataclass(frozen=True)
class Checkpoint:
    """All that a training needs to go on as if nothing had happened; random draws depend on the step alone."""

    step: int
    tensors: dict[str, torch.Tensor]
    losses: list[float]
    """Training losses since the last row of the curve."""
    curve: list[CurvePoint]


class Checkpoints:
    """The checkpoints of one run, in a folder that no other run shares.

    Args:
        root: Where all runs keep theirs.
        run: Fingerprint of everything that decides the outcome of the run.
    """

    def __init__(self, root: Path, run: str) -> None:
        self.folder = root / run[:16]

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint whole or not at all, and drop all but the last ones."""
        about = {"losses": checkpoint.losses, "curve": [asdict(point) for point in checkpoint.curve]}
        metadata = {"step": str(checkpoint.step), "about": json.dumps(about)}
        write_tensors(self.folder / f"step-{checkpoint.step:08d}.safetensors", checkpoint.tensors, metadata)
        for old in self._paths()[:-KEEP_LAST]:
            old.unlink()

    def newest(self) -> Checkpoint | None:
        """Read the newest checkpoint that is whole, or None where there is none."""
        for path in reversed(self._paths()):
            try:
                return _read(path)
            except InputError as error:
                click.echo(f"{error.message}: going back to the checkpoint before", err=True)
        return None

    def clear(self) -> None:
        """Remove the checkpoints of a run that has come to its end."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))


def _read(path: Path) -> Checkpoint:
    metadata, tensors = read_metadata(path), read_tensors(path)
    about = json.loads(metadata["about"])
    curve = [CurvePoint(**point) for point in about["curve"]]
    return Checkpoint(int(metadata["step"]), tensors, about["losses"], curve)
