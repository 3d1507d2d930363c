"""A stage that DVC started -> the same stage, which ends when DVC is gone; DVC itself leaves it running."""

import os
import signal
import sys
import threading
import time
from itertools import pairwise

import psutil

from stages.runtime.stopping import received, stop_in_one_line

STAGE_VARIABLE = "DVC_STAGE"
"""Environment variable that DVC sets for the commands of a stage, and that DVC's own process lacks."""
RANK = "LOCAL_RANK"
"""Environment variable of the processes of a launcher, which ends them by SIGTERM after one of them has failed."""
INTERVAL_S = 0.25
GRACE_S = 20.0
"""Seconds between SIGTERM and SIGKILL, as of supervisor.py."""


def end_with_dvc() -> None:
    """Watch DVC from now on, and end this process as by SIGTERM once DVC, or a shell in between, is gone.

    Watches nobody where DVC did not start this process, so that a stage of a user's own `nohup` or `&` goes on. Ctrl-C
    and SIGTERM end the process in one line, once its temporary files are removed.
    """
    stop_in_one_line((signal.SIGINT,) if RANK in os.environ else (signal.SIGINT, signal.SIGTERM))
    if STAGE_VARIABLE not in os.environ:
        return
    line = _line_to_dvc()
    if line is None:
        sys.exit(128 + signal.SIGTERM)
    threading.Thread(target=_watch, args=(line,), daemon=True).start()


def _line_to_dvc() -> list[psutil.Process] | None:
    """List this process, the shells between, and DVC; None if DVC is gone already, and another process is the parent.

    DVC starts a command in its own session. The process that takes orphans, such as init, is in another, or is
    process 1.
    """
    line = [psutil.Process()]
    try:
        while STAGE_VARIABLE in line[-1].environ():
            if not (parent := line[-1].parent()):
                return None
            line.append(parent)
    except psutil.AccessDenied:  # init, of another user
        pass
    except psutil.NoSuchProcess:
        return None
    try:
        is_dvc = os.getsid(line[-2].pid) == os.getsid(line[-1].pid)
    except ProcessLookupError:
        return None
    return line if is_dvc and (line[-1].pid != 1 or "dvc" in " ".join(line[-1].cmdline())) else None


def _watch(line: list[psutil.Process]) -> None:
    """Wait until a process of the line has lost its parent."""
    while all(_is_child(*pair) for pair in pairwise(line)):
        time.sleep(INTERVAL_S)
    if not received:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


def _is_child(process: psutil.Process, parent: psutil.Process) -> bool:
    try:
        return process.ppid() == parent.pid
    except psutil.NoSuchProcess:
        return False
