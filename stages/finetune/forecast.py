"""Measured seconds of a step, a measurement and a row of samples -> how long a training will take."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from stages.runtime.wording import count, format_duration

KIBIBYTE = 1024
TrainingCost = dict[str, float | int | None]
"""Content of cost.json."""


@dataclass(frozen=True)
class Forecast:
    """What a training still has to do, and the seconds that one of each takes."""

    steps: int
    step_s: float
    heldouts: int
    """Measurements of the held-out loss."""
    heldout_s: float
    samples: int
    """Rows of samples."""
    samples_s: float

    @property
    def seconds(self) -> float:
        """Total seconds, without those for checkpoints."""
        return self.steps * self.step_s + self.heldouts * self.heldout_s + self.samples * self.samples_s

    def summary(self) -> str:
        """Describe the forecast in one line."""
        parts = [
            f"{count(number, what)} of {seconds:.2g} s"
            for number, what, seconds in (
                (self.steps, "step", self.step_s),
                (self.heldouts, "measurement", self.heldout_s),
                (self.samples, "sample row", self.samples_s),
            )
            if number
        ]
        return f"finetune will take about {format_duration(self.seconds)}: {', '.join(parts)}"

    def with_measured(self, measured_s: float, batch_size: int) -> TrainingCost:
        """Return the forecast beside the measured seconds, images per second and peak memory."""
        return {
            "steps": self.steps,
            "forecast_s": round(self.seconds, 3),
            "measured_s": round(measured_s, 3),
            "images_per_s": round(self.steps * batch_size / max(measured_s, 1e-9), 3),
            "peak_memory_bytes": peak_memory_bytes(),
        }


def elapsed_s(function: Callable[[], object]) -> float:
    """Call a function and return the seconds it took, the GPU's work included."""
    begin = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def peak_memory_bytes() -> int:
    """Return the peak memory of this process: on the GPU if there is one, else in RAM."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else KIBIBYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
