"""A training in progress <-> safetensors files of which the newest whole one is found again."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch

from stages.artifacts import read_metadata, read_tensors, write_tensors
from stages.errors import InputError
from stages.finetune.mirror import Mirror
from stages.storage import Store

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
        store: Where copies go, so that another machine of the same kind can go on; None keeps them here only.
    """

    def __init__(self, root: Path, run: str, store: Store | None = None) -> None:
        self.folder = root / run[:16]
        self.mirror = Mirror(store, run) if store else None

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint whole or not at all, and drop all but the last ones."""
        about = {"losses": checkpoint.losses, "curve": [asdict(point) for point in checkpoint.curve]}
        metadata = {"step": str(checkpoint.step), "about": json.dumps(about)}
        path = self.folder / f"step-{checkpoint.step:08d}.safetensors"
        write_tensors(path, checkpoint.tensors, metadata)
        if self.mirror:
            self.mirror.offer(path)
        for old in self._paths()[:-KEEP_LAST]:
            old.unlink()

    def newest(self) -> Checkpoint | None:
        """Read the newest checkpoint that is whole, here or else in the store; None where there is none."""
        if self.mirror and not self._paths():
            self.mirror.fetch(self.folder)
        for path in reversed(self._paths()):
            try:
                return _read(path)
            except InputError as error:
                click.echo(f"{error.message}: going back to the checkpoint before", err=True)
        return None

    def clear(self) -> None:
        """Remove the checkpoints of a run that has come to its end; copies in the store stay."""
        if self.mirror:
            self.mirror.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))


def _read(path: Path) -> Checkpoint:
    metadata, tensors = read_metadata(path), read_tensors(path)
    about = json.loads(metadata["about"])
    curve = [CurvePoint(**point) for point in about["curve"]]
    return Checkpoint(int(metadata["step"]), tensors, about["losses"], curve)
