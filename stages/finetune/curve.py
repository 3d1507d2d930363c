"""Held-out losses over the steps -> which average is best, and whether a goal can still be reached."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from stages.runtime.errors import InputError

LOOK_BACK = 3
"""Measurements whose steepest fall is expected to go on."""


@dataclass(frozen=True)
class CurvePoint:
    """One row of the recovery curve."""

    step: int
    train_loss: float | None
    """Mean over the steps since the row before; None before the first step."""
    heldout: tuple[tuple[float, float], ...]
    """For each moving average its decay and its held-out loss, under noise that never changes."""

    @property
    def ema_decay(self) -> float:
        """Of the best average; of equal ones the first."""
        return min(self.heldout, key=lambda pair: pair[1])[0]

    def values(self) -> dict[str, float | None]:
        """Give what was measured, by the names of the columns of curve.csv."""
        averages = {f"heldout_ema_{decay}": loss for decay, loss in self.heldout}
        return {"train_loss": self.train_loss, "heldout_loss": self.heldout_loss, **averages}

    @property
    def heldout_loss(self) -> float:
        """Of the best average."""
        return min(loss for _, loss in self.heldout)


def lowest_reachable(curve: Sequence[CurvePoint], steps: int) -> float:
    """Say how low the held-out loss can get by the last step, if it falls on as fast as it did at its fastest lately.

    Over the logarithm of the steps a recovery curve flattens out, so its steepest slope of late bounds what is to come.
    Before there are enough measurements anything can be reached: -∞.
    """
    if curve[-1].step == steps:
        return curve[-1].heldout_loss
    points = [point for point in curve if point.step]
    if len(points) <= LOOK_BACK:
        return -math.inf
    recent = points[-LOOK_BACK - 1 :]
    slopes = [
        (later.heldout_loss - earlier.heldout_loss) / math.log(later.step / earlier.step)
        for earlier, later in itertools.pairwise(recent)
    ]
    last = points[-1]
    return last.heldout_loss + min(0.0, *slopes) * math.log(steps / last.step)


def check_gate(curve: Sequence[CurvePoint], steps: int, gate: float | None) -> None:
    """End a training that cannot reach its gate, or has not.

    Raises:
        InputError: So it is.
    """
    if gate is None or (best := lowest_reachable(curve, steps)) <= gate:
        return
    last = curve[-1]
    found = f"the held-out loss {last.heldout_loss:.4g} at step {last.step} falls to {best:.4g} at best by {steps}"
    raise InputError(f"{found}, finetune.gate is {gate:g}; prune less, train longer, or set finetune.gate to null")
