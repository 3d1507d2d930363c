"""One process -> one for each GPU that can share a batch, all running the same command as one training."""

import os

import click
import torch

from stages.finetune.engine import check_parts
from stages.runtime.launch import start_processes


def launch(processes: int | None, device: torch.device, batch_size: int, accumulate: int) -> int | None:
    """Run this command in several processes of this machine: `processes`, or one for each GPU if None.

    Of GPUs that cannot share a batch evenly, the largest number that can is used.

    `accelerate launch` and `torchrun` do the same from outside, and across machines; on the CPU `accelerate launch`
    starts one process only, unless MPI is installed.

    Args:
        processes: Number of processes; None is one for each GPU, or one on the CPU.
        device: CPU or GPU.
        batch_size: Images per step, over all processes.
        accumulate: Parts of a batch that each process computes.

    Returns:
        The exit code of the processes; None if this process has to train, alone or as one of several.

    Raises:
        InputError: The batch does not divide by the processes.
    """
    count = processes or 1
    if processes is None and device.type == "cuda":
        count = count_gpus(torch.cuda.device_count(), batch_size, accumulate)
    if count == 1 or "LOCAL_RANK" in os.environ:
        return None
    check_parts(batch_size, count, accumulate)
    return start_processes("finetune", count)


def count_gpus(available: int, batch_size: int, accumulate: int) -> int:
    """Return the largest number of GPUs that share a batch evenly, and print it if it is not all of them."""
    count = max(count for count in range(1, available + 1) if batch_size % (count * accumulate) == 0)
    if count < available:
        parts = f" in {accumulate} parts each" if accumulate > 1 else ""
        found = f"finetune.batch_size {batch_size} divides by {count} of the {available} GPUs{parts}"
        click.echo(f"{found}; the others stay idle", err=True)
    return count
