"""A folder that a process works in <-> a lock file in it, so that no clean-up removes it meanwhile."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from stages.storage.files import cannot_lock, cannot_write

LOCK = "lock"
ADVICE = "move the folder to a file system that has locks"


def hold_folder(folder: Path) -> IO[str]:
    """Make a folder and mark it as in use until the file that is returned is closed; several processes may do so.

    Waits while another process removes the folder.

    Raises:
        InputError: It cannot be written.
    """
    while True:
        try:
            with suppress(FileExistsError):  # though it be gone by now; of a file there the next line says what it is
                folder.mkdir(parents=True)
            with suppress(FileNotFoundError), ExitStack() as opened:  # the folder was removed since
                file = opened.enter_context((folder / LOCK).open("a"))
                _lock(file, folder)
                if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
                    opened.pop_all()
                    return file
        except OSError as error:
            raise cannot_write(folder, error) from None


def _lock(file: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError as error:
        raise cannot_lock(folder / LOCK, error, ADVICE) from None


@contextmanager
def reserved(folder: Path) -> Iterator[bool]:
    """Yield whether no process works in a folder, as far as this user can tell; while the block lasts, none begins.

    Raises:
        InputError: The file system has no locks.
    """
    try:
        file = (folder / LOCK).open("r+")
    except OSError as error:
        yield isinstance(error, FileNotFoundError)
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError as error:
            raise cannot_lock(folder / LOCK, error, ADVICE) from None
        else:
            yield True
