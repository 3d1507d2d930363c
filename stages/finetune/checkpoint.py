"""A training in progress <-> safetensors files of which the newest whole one is found again."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch

from stages.finetune.checkpoint_upload import CheckpointUploads
from stages.finetune.curve import CurvePoint
from stages.runtime.errors import InputError
from stages.storage.s3 import Store
from stages.storage.tensors import read_metadata, read_tensors, write_tensors

ABOUT = "checkpoint"
"""The one key of a file's metadata; safetensors would write several in no fixed order."""


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
        keep: How many of them stay.
    """

    def __init__(self, root: Path, run: str, store: Store | None = None, keep: int = 2) -> None:
        self.folder, self.run, self.keep = root / run[:16], run, keep
        self.uploads = CheckpointUploads(store, run) if store else None

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint whole or not at all, and drop all but the last ones."""
        curve = [asdict(point) for point in checkpoint.curve]
        about = {"run": self.run, "step": checkpoint.step, "losses": checkpoint.losses, "curve": curve}
        path = self.folder / f"step-{checkpoint.step:08d}.safetensors"
        write_tensors(path, checkpoint.tensors, {ABOUT: json.dumps(about)})
        if self.uploads:
            self.uploads.upload(path)
        for old in self._paths()[: -self.keep]:
            old.unlink()

    def newest(self) -> Checkpoint | None:
        """Read the newest checkpoint that is whole, here or else in the store; None where there is none."""
        if self.uploads and not self._paths():
            self.uploads.fetch(self.folder)
        for path in reversed(self._paths()):
            try:
                about, tensors = json.loads(read_metadata(path).get(ABOUT, "{}")), read_tensors(path)
            except InputError as error:
                click.echo(f"{error.message}: going back to the checkpoint before", err=True)
            else:
                self._check_run(about, path)
                return _unpack(about, tensors)
        return None

    def _check_run(self, about: Mapping[str, Any], path: Path) -> None:
        """Refuse a checkpoint that somebody put here.

        Raises:
            InputError: It is that of another run: other params, data, model, code or machine.
        """
        if about.get("run") != self.run:
            found = f"{path} is a checkpoint of run {str(about.get('run'))[:12]}, this is run {self.run[:12]}"
            raise InputError(f"{found}: other params, inputs, code or machine; remove it to begin anew")

    def clear(self) -> None:
        """Remove the checkpoints of a run that has come to its end; copies in the store stay."""
        if self.uploads:
            self.uploads.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))


def _unpack(about: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> Checkpoint:
    rows = ({**point, "heldout": tuple(tuple(pair) for pair in point["heldout"])} for point in about["curve"])
    curve = [CurvePoint(**row) for row in rows]
    return Checkpoint(about["step"], tensors, about["losses"], curve)
