"""An exception -> whether this machine is its cause, such as a full disk, and not the version that is checked."""

import errno
import shutil
import tempfile
from collections.abc import Container, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from stages.runtime.errors import MachineError, UnavailableError, first_line

OF_FILES = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
"""Numbers of errors that a version can cause, by a file that it lacks or a name that it holds."""


@contextmanager
def raising_machine_faults(excused: Container[int] = OF_FILES) -> Iterator[None]:
    """Raise a fault of this machine as such, also where another exception has replaced it.

    Args:
        excused: Numbers of system errors that are none.

    Raises:
        MachineError: The disk is full, a limit of the system is reached, a right is missing, or something of the kind.
    """
    try:
        yield
    except (MachineError, UnavailableError):
        raise
    except Exception as error:
        if fault := _find_fault(error, excused):
            found = f"this machine failed ({first_line(fault)}), so nothing was decided or changed"
            raise MachineError(f"{found}; mend that and retry") from None
        raise


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a temporary folder for the files of a version, and raise faults of this machine as such.

    Raises:
        MachineError: The folder cannot be made, or this machine fails while it is in use.
    """
    with raising_machine_faults(), ExitStack() as stack:
        with raising_machine_faults(excused=()):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        yield Path(folder)


def _find_fault(error: BaseException | None, excused: Container[int]) -> BaseException | None:
    """Find the fault of this machine that led to an exception."""
    while error is not None and not _is_fault(error, excused):
        error = error.__cause__ or error.__context__
    return error


def _is_fault(error: BaseException, excused: Container[int]) -> bool:
    """Return whether an exception is a fault of this machine; libraries raise OSError without number for bad files."""
    if isinstance(error, shutil.Error | MemoryError):  # shutil.Error: several files could not be copied
        return True
    return isinstance(error, OSError) and error.errno is not None and error.errno not in excused
