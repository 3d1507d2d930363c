"""One process -> several on this machine, one for each GPU, all running the same command of a stage."""

import logging
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from stages.runtime.processes import Processes, join, shared_folder
from stages.runtime.stopping import stopped_line

RUN_ID = "TORCHELASTIC_RUN_ID"


def count_processes(processes: int | None, device: torch.device) -> int:
    """Return the number of processes to use: the given one, or one for each GPU, or one on the CPU."""
    return processes or (torch.cuda.device_count() if device.type == "cuda" else 1)


def exit_code(codes: Sequence[int]) -> int:
    """Return the exit code for those of failed processes, which are negative for a signal.

    Once one process has failed, the launcher ends the others by SIGTERM. So a code that a process chose comes first,
    then another signal, such as the SIGKILL of a process that took too much memory.
    """
    chosen = [code for code in codes if code > 0]
    signals = [code for code in codes if code != -signal.SIGTERM]
    return max(chosen) if chosen else 128 - (signals or list(codes))[0]


def start_processes(stage: str, count: int, out: Path | None = None) -> int | None:
    """Run this command of a stage in `count` processes of this machine.

    `torchrun` does the same from outside; `accelerate launch` does on GPUs, and on the CPU if MPI is installed.

    Args:
        stage: The stage's name.
        count: Number of processes.
        out: The output whose shared folder is removed if the processes leave one behind.

    Returns:
        The exit code of the processes; None if this process has to work, alone or as one of several.
    """
    if count == 1 or "LOCAL_RANK" in os.environ:
        return None
    logging.disable(logging.ERROR)  # of the launcher, which does nothing else: the processes print their own errors
    os.environ[RUN_ID] = uuid.uuid4().hex
    config = LaunchConfig(
        run_id=os.environ[RUN_ID],
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", f"stages.{stage}", *sys.argv[1:])
    except ChildFailedError as error:
        return exit_code([failure.exitcode for failure in error.failures.values()])
    except SignalException as error:
        return 128 + int(error.sigval)
    finally:
        if out:
            shutil.rmtree(shared_folder(out), ignore_errors=True)
    return 0


def distribute(stage: str, count: int | None, device: torch.device, out: Path | None = None) -> Processes:
    """Start the processes that share a stage and end with their exit code, or join them if this is one of them.

    Args:
        stage: The stage's name.
        count: Number of processes; None is one for each GPU, or one on the CPU.
        device: CPU or GPU.
        out: As of `start_processes`.
    """
    if (code := start_processes(stage, count_processes(count, device), out)) is not None:
        if code == 128 + signal.SIGTERM:  # after Ctrl-C, which all get, the first of them prints
            click.echo(stopped_line(signal.SIGTERM), err=True)
        sys.exit(code)
    return join(device)
