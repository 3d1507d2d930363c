"""One process -> one for each GPU that can share a batch, all running the same command as one training."""

import os

import click
import torch

from stages.finetune.engine import BATCH_SIZE, check_parts
from stages.runtime.launch import start_processes


def launch(
    processes: int | None, device: torch.device, num_images: int, accumulate: int, key: str = BATCH_SIZE
) -> int | None:
    """Run this command in several processes of this machine: `processes`, or one for each GPU if None.

    Of GPUs that cannot share a batch evenly, the largest number that can is used.

    `accelerate launch` and `torchrun` do the same from outside, and across machines; on the CPU `accelerate launch`
    starts one process only, unless MPI is installed.

    Args:
        processes: Number of processes; None is one for each GPU, or one on the CPU.
        device: CPU or GPU.
        num_images: Images of a step that all processes share evenly.
        accumulate: Parts of a batch that each process computes.
        key: Where params.yaml has their number, for messages.

    Returns:
        The exit code of the processes; None if this process has to train, alone or as one of several.

    Raises:
        InputError: The images do not divide by the processes.
    """
    count = processes or 1
    if processes is None and device.type == "cuda":
        count = count_gpus(torch.cuda.device_count(), num_images, accumulate, key)
    if count == 1 or "LOCAL_RANK" in os.environ:
        return None
    check_parts(num_images, count, accumulate, key)
    return start_processes("finetune", count)


def count_gpus(available: int, num_images: int, accumulate: int, key: str = BATCH_SIZE) -> int:
    """Return the largest number of GPUs that share the images of a step evenly; print it if it is not all of them."""
    count = max(count for count in range(1, available + 1) if num_images % (count * accumulate) == 0)
    if count < available:
        parts = f" in {accumulate} parts each" if accumulate > 1 else ""
        found = f"{key} {num_images} divides by {count} of the {available} GPUs{parts}"
        click.echo(f"{found}; the others stay idle", err=True)
    return count
