"""Held-out losses over the steps -> the best EMA decay, and whether the gate can still be reached."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from stages.finetune.params import FinetuneParams
from stages.runtime.errors import InputError

NUM_SLOPES = 3
"""Last segments of the curve of which the steepest slope bounds the rest."""
SPACING = 1.25
"""Smallest ratio of the steps at the ends of a segment."""


@dataclass(frozen=True)
class CurvePoint:
    """One row of the recovery curve."""

    step: int
    train_loss: float | None
    """Mean over the steps since the previous row; None before the first step."""
    heldout: tuple[tuple[float, float], ...]
    """(EMA decay, held-out loss) of each EMA model."""

    @property
    def ema_decay(self) -> float:
        """Decay of the EMA model with the lowest held-out loss; the first of equal ones."""
        return min(self.heldout, key=lambda pair: pair[1])[0]

    @property
    def heldout_loss(self) -> float:
        """Lowest held-out loss of the EMA models."""
        return min(loss for _, loss in self.heldout)

    def values(self) -> dict[str, float | None]:
        """Return the losses by the names of the columns of curve.csv."""
        by_decay = {f"heldout_ema_{decay}": loss for decay, loss in self.heldout}
        return {"train_loss": self.train_loss, "heldout_loss": self.heldout_loss, **by_decay}


def lowest_reachable(curve: Sequence[CurvePoint], params: FinetuneParams) -> float:
    """Bound the held-out loss at the last step from below.

    At a constant learning rate a recovery curve flattens over the logarithm of the steps, so the steepest of its last
    slopes bounds the rest. They are those between points that are a factor of `SPACING` apart, since a slope over few
    steps is noise, and snapshots and samples are points, too. The bound is -∞ until there are enough such points after
    the warm-up, and where the learning rate falls, since the loss may fall fastest at the end.
    """
    last, steps = curve[-1], params.steps
    if last.step == steps:
        return last.heldout_loss
    recent = [last]
    for point in reversed(curve):
        if params.warmup_steps < point.step <= recent[0].step / SPACING and len(recent) <= NUM_SLOPES:
            recent.insert(0, point)
    if len(recent) <= NUM_SLOPES or params.schedule != "constant":
        return -math.inf
    slopes = [
        (later.heldout_loss - earlier.heldout_loss) / math.log(later.step / earlier.step)
        for earlier, later in itertools.pairwise(recent)
    ]
    return last.heldout_loss + min(0.0, *slopes) * math.log(steps / last.step)


def check_gate(curve: Sequence[CurvePoint], params: FinetuneParams) -> None:
    """Check that the held-out loss has reached the gate, if there is one, by the last step, or still can.

    Raises:
        InputError: The gate was missed or can no longer be reached.
    """
    gate, steps = params.gate, params.steps
    if gate is None or not curve or (lowest := lowest_reachable(curve, params)) <= gate:
        return
    last = curve[-1]
    found = f"the held-out loss {last.heldout_loss:.4g} at step {last.step} falls to {lowest:.4g} at best by {steps}"
    raise InputError(f"{found}, finetune.gate is {gate:g}; prune less, train longer, or set finetune.gate to null")
