"""A training under way -> its best EMA weights at chosen steps, and the seconds that its steps took until then."""

import copy
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from stages.models.families import Denoiser
from stages.runtime.device import device_name
from stages.runtime.environment import SHARED_VARIABLE

PREFIX = "snapshot."
Weights = dict[str, torch.Tensor]


@dataclass
class TrainingClock:
    """Adds up the seconds of optimiser steps, without those of measuring, drawing and saving between them."""

    seconds: float = 0.0
    """Total of the steps so far, those before a restart included."""
    by_step: dict[int, float] = field(default_factory=dict)
    """Step of a snapshot -> total until then."""
    machine: str = field(default_factory=device_name)
    """Where all steps were taken; empty if they were taken on several machines, whose seconds do not add up."""
    alone: bool = field(default_factory=lambda: SHARED_VARIABLE not in os.environ)
    """Whether no step was taken while several cells of a flow shared this machine."""
    _began: float | None = None

    def resume(self, before: "TrainingClock") -> None:
        """Go on from the clock of a training that was stopped, whose steps may have been taken elsewhere."""
        self.seconds, self.by_step = before.seconds, dict(before.by_step)
        self.machine = self.machine if before.machine == self.machine else ""
        self.alone = self.alone and before.alone

    def start(self) -> None:
        """Start to count, unless it counts already."""
        if self._began is None:
            self._began = time.perf_counter()

    def stop(self) -> None:
        """Wait until the device has finished the steps, and stop to count."""
        if self._began is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self._began
        self._began = None

    def mark(self, step: int) -> None:
        """Note the total at a step; the clock has been stopped."""
        self.by_step[step] = self.seconds


class Snapshots:
    """Weights of a training at chosen steps, in main memory.

    They are part of each checkpoint, so that a training which goes on elsewhere has them too.
    """

    def __init__(self) -> None:
        self.weights: dict[int, Weights] = {}

    def take(self, step: int, unet: Denoiser) -> None:
        """Copy the weights of a model."""
        self.weights[step] = {name: tensor.to("cpu", copy=True) for name, tensor in unet.state_dict().items()}

    def to_tensors(self) -> Weights:
        """Collect all weights under names that begin with the step."""
        return {
            f"{PREFIX}{step}.{name}": tensor
            for step, weights in self.weights.items()
            for name, tensor in weights.items()
        }

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load what `to_tensors` collected, and forget all else."""
        self.weights = {}
        for key, tensor in tensors.items():
            if key.startswith(PREFIX):
                step, _, name = key.removeprefix(PREFIX).partition(".")
                self.weights.setdefault(int(step), {})[name] = tensor

    def models(self, like: Denoiser) -> Iterator[tuple[int, Denoiser]]:
        """Yield step and model of each snapshot, in the order of the steps; all are one model with other weights."""
        model = copy.deepcopy(like)
        for step in sorted(self.weights):
            model.load_state_dict(self.weights[step])
            yield step, model
