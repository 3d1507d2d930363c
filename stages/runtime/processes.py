"""This process among those that share the work of one stage; it is the only one unless a launcher started several."""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from torch.distributed import ProcessGroup

from stages.runtime.device import keep_freed_memory

Item = TypeVar("Item")

TIMEOUT = timedelta(days=30)
"""How long a process waits for the others; the launcher ends all of them once one has failed."""


class Processes:
    """Number and place of this process, and what it exchanges with the others.

    What is shared is divided into items whose results depend on nothing but the item, and sums are taken in the order
    of the items, so that the number of processes changes no result.

    Args:
        device: The device of this process.
        group: All processes; None if there is no other.
    """

    def __init__(self, device: torch.device, group: ProcessGroup | None = None) -> None:
        self.device, self.group = device, group
        self.index, self.count = (group.rank(), group.size()) if group else (0, 1)
        self.is_main = self.index == 0

    def share(self, items: Sequence[Item], before: int = 0) -> Sequence[Item]:
        """Return this process's part of some items, of which `before` others were shared already: every count-th."""
        return items[(self.index - before) % self.count :: self.count]

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.group:
            self.group.barrier().wait()

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Return the values of each process; all have the same number of values."""
        if not self.group:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        parts = [torch.empty_like(own) for _ in range(self.count)]
        self.group.allgather([parts], [own]).wait()
        return [part.tolist() for part in parts]

    def share_sha256(self, compute: Callable[[], str]) -> str:
        """Return the SHA-256, in hexadecimal, that `compute` returns in the main process; no other one calls it."""
        if not self.group:
            return compute()
        digest = bytes.fromhex(compute()) if self.is_main else bytes(32)
        (shared,) = self.broadcast([torch.tensor(list(digest), dtype=torch.uint8, device=self.device)], 0)
        return bytes(shared.tolist()).hex()

    def send(self, tensors: Sequence[torch.Tensor], receiver: int) -> None:
        """Send tensors to another process, which receives them at the same time."""
        assert self.group
        for tensor in tensors:
            self.group.send([tensor.contiguous()], receiver, 0).wait()

    def receive(self, like: Sequence[torch.Tensor], sender: int) -> list[torch.Tensor]:
        """Receive tensors of the shapes of `like` from another process."""
        assert self.group
        received = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in like]
        for tensor in received:
            self.group.recv([tensor], sender, 0).wait()
        return received

    def broadcast(self, tensors: Sequence[torch.Tensor], sender: int) -> list[torch.Tensor]:
        """Return the tensors of one process on every process; those of the others give the shapes."""
        if not self.group:
            return list(tensors)
        copies = [tensor.contiguous() for tensor in tensors]
        for tensor in copies:
            self.group.broadcast(tensor, sender).wait()
        return copies


def join(device: torch.device) -> Processes:
    """Join the processes that a launcher has started together with this one; on GPUs each has its own.

    On the CPU, the process keeps freed memory from then on.
    """
    if device.type == "cpu":
        keep_freed_memory()
    if "LOCAL_RANK" not in os.environ:
        return Processes(device)
    from accelerate import PartialState  # noqa: PLC0415  # takes a second, and most stages run alone

    state = PartialState(cpu=device.type == "cpu", timeout=TIMEOUT)
    return Processes(state.device, torch.distributed.group.WORLD)


def shared_folder(folder: Path) -> Path:
    """Return the temporary folder beside an output that all processes of a launch write to."""
    launch = "".join(filter(str.isalnum, os.environ.get("TORCHELASTIC_RUN_ID", "none")))
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.{launch}")
