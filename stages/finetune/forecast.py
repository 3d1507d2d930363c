"""Steps, measurements and pictures, each timed once -> how long a training will take, and how right that was."""

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

KIBIBYTE = 1024
Cost = dict[str, float | int | None]


@dataclass(frozen=True)
class Forecast:
    """What is left to do, and what one of each takes."""

    steps: int
    step_s: float
    heldouts: int
    heldout_s: float
    samples: int
    samples_s: float

    @property
    def seconds(self) -> float:
        """All of it; saving checkpoints is not in it."""
        return self.steps * self.step_s + self.heldouts * self.heldout_s + self.samples * self.samples_s

    def line(self) -> str:
        """Write it as one line."""
        parts = [
            f"{count} {what} of {seconds:.2g} s"
            for count, what, seconds in (
                (self.steps, "steps", self.step_s),
                (self.heldouts, "measurements", self.heldout_s),
                (self.samples, "rows of pictures", self.samples_s),
            )
            if count
        ]
        return f"finetune will take about {in_time(self.seconds)}: {', '.join(parts)}"

    def compare(self, measured_s: float, batch_size: int) -> Cost:
        """Set it against what was measured: seconds, images a second, bytes of memory at the highest."""
        return {
            "steps": self.steps,
            "forecast_s": round(self.seconds, 3),
            "measured_s": round(measured_s, 3),
            "images_per_s": round(self.steps * batch_size / max(measured_s, 1e-9), 3),
            "peak_memory_bytes": peak_memory_bytes(),
        }


def timed(act: Callable[[], object]) -> float:
    """Say how many seconds something takes, the device's work included."""
    begin = time.perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def peak_memory_bytes() -> int:
    """Give the most memory that was in use: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else KIBIBYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_time(seconds: float) -> str:
    """Write seconds as people say it: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:  # noqa: PLR2004
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:  # noqa: PLR2004
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
