"""One process -> one for each GPU, all running the same command as one training."""

import logging
import os
import sys

import click
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from stages.finetune.engine import check_parts


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
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes print their own errors
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    try:
        elastic_launch(config, sys.executable)("-m", "stages.finetune", *sys.argv[1:])
    except ChildFailedError as error:
        return max(abs(failure.exitcode) for failure in error.failures.values())
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def count_gpus(available: int, batch_size: int, accumulate: int) -> int:
    """Return the largest number of GPUs that share a batch evenly, and print it if it is not all of them."""
    count = max(count for count in range(1, available + 1) if batch_size % (count * accumulate) == 0)
    if count < available:
        parts = f" in {accumulate} parts each" if accumulate > 1 else ""
        found = f"finetune.batch_size {batch_size} divides by {count} of the {available} GPUs{parts}"
        click.echo(f"{found}; the others stay idle", err=True)
    return count
