"""Loss and gradient norm of each step, on the device -> checked numbers, read together."""

import math

import torch

from stages.runtime.errors import InputError

READ_EVERY = 50
"""Most steps whose losses stay on the device, and so the most that a training takes after one that is not finite."""


class StepLosses:
    """Training losses since the last row of the curve.

    Reading a number from a GPU waits for all that it has to compute, so the losses of many steps are read at once.
    """

    def __init__(self) -> None:
        self.values: list[float] = []
        self._pending: list[tuple[int, torch.Tensor]] = []

    def add(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Add the loss [] of a step and the norm [] of its gradient.

        Raises:
            InputError: The losses were read, and one is not finite.
        """
        self._pending.append((step, torch.stack([loss, norm])))
        if len(self._pending) == READ_EVERY:
            self.read()

    def read(self) -> list[float]:
        """Return the losses, once all are checked.

        Raises:
            InputError: A loss or the norm of its gradient is not finite.
        """
        if self._pending:
            steps, numbers = zip(*self._pending, strict=True)
            for step, (loss, norm) in zip(steps, torch.stack(numbers).tolist(), strict=True):
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    found = f"the loss is {loss} and its gradient's norm {norm} at step {step}"
                    raise InputError(f"{found}; lower finetune.learning_rate; the last checkpoint is kept")
                self.values.append(loss)
            self._pending = []
        return self.values
