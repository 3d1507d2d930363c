"""Runs of one machine -> their commands side by side, or one alone while it takes times."""

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import IO

from flows.workspaces.commands import Log, pause
from flows.workspaces.repository import (
    POLL_S,
    lock_errors,
    make_folder,
    make_shared_folder,
    shared_folder,
    try_lock,
)
from stages.runtime.errors import InputError

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Names a running kernel: the containers of one machine have it in common, machines on one file system have not."""


def machine_lock(root: Path | None = None) -> Path:
    """Return the lock file of this machine in the folder that runs share.

    Args:
        root: The folder; None is that of shared_folder.

    Raises:
        InputError: As of shared_folder.
    """
    root = root or shared_folder()
    machine = BOOT_ID.read_text().strip() if BOOT_ID.is_file() else platform.node()
    return root / "locks" / f"machine-{machine}.lock"


@contextmanager
def at_work(lock: Path, log: Log, *, alone: bool) -> Iterator[None]:
    """Compute beside other runs that share the lock file, or alone; the system releases it when this process ends.

    Who wants to be alone waits until no other run computes. Meanwhile the others may go on to their next stage: each of
    them gets to the stage that takes times, and waits there.

    Args:
        lock: The lock file of this machine.
        log: Called with a line that says what is waited for.
        alone: Whether times are taken.

    Raises:
        InputError: The file cannot be written or locked.
    """
    make_shared_folder(lock.parent.parent)
    make_folder(lock.parent)
    with ExitStack() as opened:
        with lock_errors(lock):
            _wait(opened.enter_context(lock.open("a")), log, alone=alone)
        yield


def beside_runs(log: Log) -> AbstractContextManager[None]:
    """Compute beside the runs of this machine, after one that takes times, where this user may have runs."""
    try:
        lock = machine_lock()
    except InputError:  # a run would end with it
        return nullcontext()
    is_open = os.access(lock.parent, os.W_OK | os.X_OK) and (os.access(lock, os.W_OK) or not lock.exists())
    return at_work(lock, log, alone=False) if is_open else nullcontext()


def _wait(file: IO[str], log: Log, *, alone: bool) -> None:
    how = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
    if not try_lock(file, how):
        log("waiting until no other run computes on this machine" if alone else "waiting for a run that takes times")
        while not try_lock(file, how):  # a call that blocks could not be cancelled
            pause(POLL_S)
