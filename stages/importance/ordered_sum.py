"""Tensors of several processes -> their sum, added in one order whatever the number of processes."""

from collections.abc import Sequence

import torch

from stages.runtime.processes import Processes


class OrderedSum:
    """A running sum that goes from process to process, each of which adds its own tensors.

    Floating-point sums depend on their order. Adding in the order of the timesteps, as one process does, gives the same
    bits on any number of processes.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.holder: int | None = None
        """The process that has the sum; None before the first addition."""
        self.total: list[torch.Tensor] = []

    @torch.no_grad()
    def add(self, own: Sequence[torch.Tensor], contributors: Sequence[int]) -> None:
        """Add the tensors of some processes in this order; every process calls it with the same contributors.

        Args:
            own: The tensors of this process, which belong to the sum from then on; unused if it does not contribute.
            contributors: Indices of the processes that add theirs.
        """
        for index in contributors:
            if self.holder not in (None, index):
                self._hand_over(own, index)
            if index == self.processes.index:
                self.total = self._added(own)
            self.holder = index

    def _added(self, own: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if not self.total:
            return list(own)
        return [total.add_(value) for total, value in zip(self.total, own, strict=True)]

    def _hand_over(self, like: Sequence[torch.Tensor], receiver: int) -> None:
        assert self.holder is not None
        if receiver == self.processes.index:
            self.total = self.processes.receive(like, self.holder)
        elif self.holder == self.processes.index:
            self.processes.send(self.total, receiver)
            self.total = []

    def result(self, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the sum on every process; `like` gives the shapes, and the value if nothing was added."""
        if self.holder is None:
            return list(like)
        return self.processes.broadcast(self.total or like, self.holder)
