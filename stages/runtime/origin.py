"""The environment -> the repository that runs are cloned from, and the folder of their records."""

import os
from pathlib import Path

from stages.runtime.environment import HOME_VARIABLE, REPOSITORY_VARIABLE
from stages.runtime.errors import InputError, without_password


def find_origin() -> str:
    """Return the folder or address in ESPALIER_REPOSITORY, by default the current folder.

    Raises:
        InputError: It is no folder of this machine, and ESPALIER_HOME names none for what runs share.
    """
    origin = os.environ.get(REPOSITORY_VARIABLE) or str(Path.cwd())
    if not os.environ.get(HOME_VARIABLE) and not Path(origin).is_dir():
        found = f"{REPOSITORY_VARIABLE} is {without_password(origin)}, no folder here"
        raise InputError(f"{found}; correct it, or set {HOME_VARIABLE} to a folder for workspaces, cache and records")
    return origin


def records_folder() -> Path:
    """Return the folder of mlflow.db: ESPALIER_HOME, the repository that runs are cloned from, or the current one.

    Raises:
        InputError: ESPALIER_REPOSITORY is an address or a missing folder, and ESPALIER_HOME is not set.
    """
    return Path(os.environ.get(HOME_VARIABLE) or find_origin()).resolve()
