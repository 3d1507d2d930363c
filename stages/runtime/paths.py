"""A path as params.yaml gives it -> the path on this machine."""

import os
import re
from pathlib import Path

from stages.runtime.errors import InputError


def expand_path(path: Path, key: str) -> Path:
    """Expand ~ and the environment variables in a path.

    Args:
        path: The path as params.yaml gives it.
        key: Its key in params.yaml, for messages.

    Raises:
        InputError: A variable is not set, the user that follows ~ does not exist, or the path cannot be followed.
    """
    try:
        expanded = os.path.expandvars(path.expanduser())
    except RuntimeError:  # ~ followed by an unknown user
        raise InputError(f"{key} is {path}, and this home folder does not exist; give an absolute path") from None
    if missing := re.search(r"\$\{?(\w+)", expanded):
        raise InputError(f"{key} is {path} and ${missing[1]} is not set; set it in the environment or change the path")
    try:
        Path(expanded).stat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # the caller says what is missing
    except (OSError, ValueError) as error:  # no permission, a name that is too long, a null byte
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{key} is {path}: {reason}; correct the path or its permissions") from None
    return Path(expanded)
