"""A process -> a text that names it and no later one of its id; that text -> whether the process has ended."""

import os
import socket
from pathlib import Path

import psutil


def describe_process(pid: int) -> str:
    """Name a process: where it is visible, its id, and psutil's hash of its id and start.

    The hash counts the start from the boot. A start in the time of day, such as that of create_time, would change
    whenever the clock is set, and a running process would then pass for one that has ended.
    """
    return f"{_visibility()} {pid} {hash(psutil.Process(pid)):x}"


def _visibility() -> str:
    """Name the host, the PID namespace and the user; processes of another of these may be invisible here."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {namespace.stat().st_ino if namespace.exists() else 0} {os.getuid()}"


def has_ended(process: str) -> bool:
    """Return whether a process has ended; False if it ran where this process might not see it."""
    where, _, pid = process.rpartition(" ")[0].rpartition(" ")
    if where != _visibility() or not pid.isdigit():
        return False
    try:
        return describe_process(int(pid)) != process
    except psutil.NoSuchProcess:
        return True
