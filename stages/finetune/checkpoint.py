"""A training in progress <-> safetensors files, of which the newest intact one is read."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field

from stages.finetune.buffers import set_buffers, unsaved_buffers
from stages.finetune.checkpoint_upload import CheckpointUploads
from stages.finetune.curve import CurvePoint
from stages.finetune.optimizer import Moments, WeightOptimizer
from stages.finetune.snapshots import TrainingClock
from stages.models.families import Denoiser
from stages.runtime.bounded import parse_json
from stages.runtime.errors import InputError, first_line, warn
from stages.runtime.schema import Frozen
from stages.storage.files import write_json
from stages.storage.in_use import hold_folder, reserved
from stages.storage.s3 import Store
from stages.storage.tensors import read_metadata, read_tensors, write_tensors

TRAINING = "training.json"
"""File beside the checkpoints: seed and params of the training."""
METADATA_KEY = "checkpoint"
"""The only key of a file's metadata, because safetensors writes several keys in no fixed order."""


@dataclass(frozen=True)
class Checkpoint:
    """The complete state of a training; random draws depend on the step alone and need no state."""

    step: int
    """Steps that are done."""
    tensors: dict[str, torch.Tensor]
    losses: list[float]
    """Training losses since the last row of the curve."""
    curve: list[CurvePoint]
    clock: TrainingClock = field(default_factory=TrainingClock, compare=False)
    """Seconds of the steps, which no bit of the outcome depends on."""


class Checkpoints:
    """The checkpoints of one run, in a folder that no other run uses.

    Args:
        root: Parent folder of the checkpoints of all runs.
        run: Fingerprint of everything that determines the outcome of the run.
        store: Store that receives copies, so that another machine of the same kind can resume; None disables them.
        keep: Number of checkpoints that are kept.
    """

    def __init__(self, root: Path, run: str, store: Store | None = None, keep: int = 2) -> None:
        self.folder, self.run, self.keep = root / run[:16], run, keep
        self.damaged: set[Path] = set()
        self.uploads = CheckpointUploads(store, run, keep) if store else None

    def hold(self, training: Mapping[str, object]) -> IO[str]:
        """Keep a clean-up from the checkpoints until the returned file is closed, and write down what is trained.

        Raises:
            InputError: The folder cannot be written.
        """
        with reserved(self.folder) as is_free:
            for left in self.folder.glob(".*load.*") if is_free else ():  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        lock = hold_folder(self.folder)
        write_json(self.folder / TRAINING, training)
        if self.uploads:
            self.uploads.note(training)
        return lock

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint atomically and remove all but the last `keep`, and those that were found damaged."""
        curve = [asdict(point) for point in checkpoint.curve]
        metadata = {"run": self.run, "step": checkpoint.step, "losses": checkpoint.losses, "curve": curve}
        clock = checkpoint.clock
        metadata |= {"seconds": clock.seconds, "seconds_by_step": clock.by_step}
        metadata |= {"machine": clock.machine, "alone": clock.alone}
        path = self.folder / f"step-{checkpoint.step:08d}.safetensors"
        write_tensors(path, checkpoint.tensors, {METADATA_KEY: json.dumps(metadata)})
        if self.uploads:
            self.uploads.upload(path)
        self.damaged.discard(path)
        intact = [each for each in self._paths() if each not in self.damaged]
        for old in [*intact[: -self.keep], *self.damaged]:
            old.unlink(missing_ok=True)
        self.damaged.clear()

    def newest(self) -> Checkpoint | None:
        """Read the newest intact checkpoint, from this machine or else from the store; None if there is none.

        Raises:
            InputError: The checkpoint belongs to another run, or the store has copies of which none can be downloaded.
        """
        found = self._newest_here()
        if found is None and self.uploads:
            self.uploads.download(self.folder)
            found = self._newest_here()
        return found

    def _newest_here(self) -> Checkpoint | None:
        """Read the newest intact checkpoint of this machine, and note the damaged ones, whose steps are taken again."""
        self.damaged.clear()
        for path in reversed(self._paths()):
            try:
                metadata, tensors = _read_metadata(path), read_tensors(path)
            except InputError as error:
                warn(f"{error.message}; this checkpoint is skipped")
                self.damaged.add(path)
            else:
                self._check_run(metadata.run, path)
                return Checkpoint(metadata.step, tensors, metadata.losses, metadata.curve, metadata.clock())
        return None

    def _check_run(self, run: object, path: Path) -> None:
        if run != self.run:
            found = f"{path} is a checkpoint of run {str(run)[:12]}, this is run {self.run[:12]}"
            raise InputError(f"{found}: other params, inputs, code or machine; remove it to start again")

    def clear(self) -> None:
        """Remove the checkpoints of a finished run from this machine; copies in the store stay."""
        self.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait(self) -> None:
        """Wait until the last checkpoint is in the store, if there is one; after a failure that is a warning."""
        if self.uploads:
            self.uploads.wait()

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))


class _Metadata(Frozen):
    """The metadata of a checkpoint's file; a training that diverged may hold NaN and infinity."""

    model_config = ConfigDict(allow_inf_nan=True)
    run: str
    step: int = Field(ge=0)
    losses: list[float]
    curve: list[CurvePoint]
    seconds: float = Field(0, ge=0)
    seconds_by_step: dict[int, float] = Field(default_factory=dict)
    machine: str = ""
    """Unknown in files from before it was noted, as is whether the training was alone."""
    alone: bool = False

    def clock(self) -> TrainingClock:
        """Return the clock of the training."""
        return TrainingClock(self.seconds, dict(self.seconds_by_step), self.machine, self.alone)


def _read_metadata(path: Path) -> _Metadata:
    """Read the metadata of a checkpoint.

    Raises:
        InputError: It is damaged.
    """
    try:
        return _Metadata.model_validate(parse_json(read_metadata(path).get(METADATA_KEY, "{}").encode()))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({first_line(error)})") from None


def to_tensors(
    unet: Denoiser,
    ema_models: Mapping[float, Denoiser],
    optimizer: WeightOptimizer,
    samples: Mapping[int, NDArray[np.uint8]],
) -> dict[str, torch.Tensor]:
    """Collect weights, buffers, EMA weights, moments of the optimiser and samples under names with a prefix each."""
    states = {"unet": unet.state_dict()}
    states |= {f"ema.{decay}": model.state_dict() for decay, model in ema_models.items()}
    # Every EMA model has the same ones. safetensors refuses tensors that share memory, and complex128.
    unsaved = {name: it.clone() for name, it in unsaved_buffers(unet).items() if it.dtype != torch.complex128}
    states["buffers"] = unsaved
    states |= {f"optimizer.{parameter}": moments for parameter, moments in optimizer.moments().items()}
    states["samples"] = {str(step): torch.from_numpy(drawn) for step, drawn in samples.items()}
    return {f"{prefix}.{name}": tensor for prefix, state in states.items() for name, tensor in state.items()}


def load_tensors(
    tensors: Mapping[str, torch.Tensor],
    unet: Denoiser,
    ema_models: Mapping[float, Denoiser],
    optimizer: WeightOptimizer,
) -> dict[int, NDArray[np.uint8]]:
    """Load into models and optimiser what `to_tensors` collected, and return the samples."""
    unsaved = _with_prefix("buffers.", tensors)
    for prefix, model in {"unet": unet, **{f"ema.{decay}": model for decay, model in ema_models.items()}}.items():
        model.load_state_dict(_with_prefix(f"{prefix}.", tensors))
        set_buffers(model, unsaved, unsaved)
    moments: dict[str, Moments] = {}
    for name, tensor in _with_prefix("optimizer.", tensors).items():
        parameter, key = name.rsplit(".", 1)
        moments.setdefault(parameter, {})[key] = tensor
    optimizer.load_moments(moments)
    return {int(step): drawn.numpy() for step, drawn in _with_prefix("samples.", tensors).items()}


def _with_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
