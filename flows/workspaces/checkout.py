"""The user's own checkout -> one run of its stages at a time; the second one waits and names the first."""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NoReturn

import psutil

from flows.workspaces import dvc_command
from flows.workspaces.commands import Log
from flows.workspaces.mending import mend
from flows.workspaces.repository import POLL_S, hold_lock
from stages.runtime.errors import InputError

LOCK = Path(".dvc/tmp/checkout.lock")
"""DVC's own locks do not wait: of two runs in one checkout, one would end with an error that files are busy."""


def lock_checkout(folder: Path, log: Log) -> IO[str]:
    """Wait until no other run works in the checkout, and mend what a kill left; the lock lasts until it is closed.

    Raises:
        InputError: The folder has no .dvc folder, or it cannot be written.
    """
    if not (folder / ".dvc").is_dir():
        raise InputError(f"{folder} has no .dvc folder; set DVC up first: dvc init")
    try:
        (folder / LOCK).parent.mkdir(exist_ok=True)
        lock = hold_lock(folder / LOCK, log, "works in this checkout")
    except OSError as error:
        raise InputError(f"{folder / LOCK} cannot be written ({error.strerror}); DVC needs that folder, too") from None
    _wait_for_stages(folder, log)
    mend(folder, log)
    return lock


def _wait_for_stages(folder: Path, log: Log) -> None:
    """Wait for stages of the checkout whose DVC was killed: they may still save their work."""
    told = None
    while pid := find_stage(str(folder.resolve())):
        if pid != told:
            log(f"waiting for process {pid}, a stage that still runs in this checkout")
        told = pid
        time.sleep(POLL_S)


def find_stage(root: str) -> int | None:
    """Find a process that a DVC of the folder started for a stage, and that is none of this process's parents."""
    own = [os.getpid(), *(process.pid for process in psutil.Process().parents())]
    for process in psutil.process_iter(["environ"]):
        environment = process.info["environ"] or {}
        if "DVC_STAGE" in environment and environment.get("DVC_ROOT") == root and process.pid not in own:
            return int(process.pid)
    return None


def run_dvc_repro(options: Sequence[str], log: Log) -> NoReturn:
    """Wait for other runs, then become `dvc repro`, which holds the lock as long as it lives.

    Raises:
        InputError: The current folder has no .dvc folder.
    """
    lock = lock_checkout(Path.cwd(), log)
    os.set_inheritable(lock.fileno(), True)  # noqa: FBT003  # DVC closes it before it starts a stage
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", dvc_command.__name__, "repro", *options]
    os.execve(sys.executable, command, {**os.environ, "PATH": path})  # noqa: S606  # no shell is needed
