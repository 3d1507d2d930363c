"""The environment of this process -> the part that code of others may see."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from stages.runtime.environment import KERNELS

ALLOWED = (
    *KERNELS,
    "LANG",
    "LANGUAGE",
    "LC_ALL",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "TZ",
)
"""Variables that change how a program computes and prints, and hold no secret."""
REPLACED = {"HOME", "LOGNAME", "MLFLOW_TRACKING_URI", "PATH", "TMPDIR", "USER"}
"""Variables of which the sandbox has its own."""
OFFLINE = {"DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


def make_environment(home: Path, extra: Iterable[str] = ()) -> dict[str, str]:
    """Copy the allowed variables and the named ones; home and temporary files are in `home`.

    Args:
        home: An empty folder.
        extra: Names of further variables.
    """
    return {
        **{key: os.environ[key] for key in (*ALLOWED, *extra) if key in os.environ},
        **OFFLINE,
        "HOME": str(home),
        "TMPDIR": str(home),
        "LOGNAME": "sandbox",
        "USER": "sandbox",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"]),
        "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db",
    }
