"""A folder or a part of a bucket -> named files, each written whole, that several workers share."""

import fcntl
import hashlib
import os
import uuid
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from stages.runtime.errors import InputError, without_password
from stages.storage.files import cannot_lock, cannot_write, file_sha256, write_atomically
from stages.storage.s3_place import CONTROL, BucketPlace

CLAIMS = f"{CONTROL}/claims"
"""File of a folder whose bytes are locked."""


class Place(Protocol):
    """Named files, and claims of names; every method raises InputError in one line where it cannot do its work."""

    uri: str
    """Path or address, for messages."""

    def read(self, name: str) -> bytes | None:
        """Read a file; None if it does not exist."""
        ...

    def sizes(self) -> dict[str, int]:
        """List all files: name -> size in bytes; empty if the place does not exist."""
        ...

    def sha256(self, name: str) -> str:
        """Hash a file that exists."""
        ...

    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless it exists; returns whether this call wrote it."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write a file, in place of an older one; no reader finds a part of it."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        ...

    def claim(self, name: str) -> AbstractContextManager[bool]:
        """Yield whether the name is this process's own while the block lasts; a process that is killed loses it."""
        ...


class FolderPlace:
    """A folder; a claim is a lock on one byte of a file, which the system frees when its process ends.

    Such locks work on one machine, and on network file systems that have POSIX locks. They exclude other processes and
    not other threads.

    Args:
        root: The folder; it is made by the first write.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.uri = root, str(root)
        self._claims: int | None = None

    def read(self, name: str) -> bytes | None:
        """Read a file; None if it does not exist."""
        try:
            return (self.root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise InputError(f"cannot read {self.root / name}: {error.strerror}") from None

    def sizes(self) -> dict[str, int]:
        """List all files of the folder and of the one for control; those that are being written are left out."""
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"{self.root} is a file; choose another folder")
        paths = [path for folder in (self.root, self.root / CONTROL) for path in _files(folder)]
        sizes = {}
        for path in paths:
            with suppress(FileNotFoundError):  # another process has removed it since
                sizes[path.relative_to(self.root).as_posix()] = path.stat().st_size
        return sizes

    def sha256(self, name: str) -> str:
        """Hash a file that exists."""
        try:
            return file_sha256(self.root / name)
        except OSError as error:
            raise InputError(f"cannot read {self.root / name}: {error.strerror}") from None

    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless it exists: under another name, which is then linked to its own."""
        target = self.root / name
        temporary = target.with_name(f".{uuid.uuid4().hex}.part")
        write_atomically(temporary, content)
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError as error:
            raise cannot_write(target, error) from None
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def write(self, name: str, content: bytes) -> None:
        """Write a file whose name is claimed."""
        write_atomically(self.root / name, content)

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        try:
            (self.root / name).unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(self.root / name, error) from None

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Lock the byte of a name."""
        file, byte = self._open_claims(), int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):  # a system may name either where another process has the lock
            yield False
            return
        except OSError as error:
            remedy = "choose a folder on a file system that has locks, or s3://BUCKET/PREFIX"
            raise cannot_lock(self.root / CLAIMS, error, remedy) from None
        try:
            yield True
        finally:
            fcntl.lockf(file, fcntl.LOCK_UN, 1, byte)

    def _open_claims(self) -> int:
        """Open the file of claims once: a process that closes it a second time would lose all of its locks."""
        if self._claims is None:
            path = self.root / CLAIMS
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._claims = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise cannot_write(path, error) from None
            weakref.finalize(self, os.close, self._claims)
        return self._claims


def _files(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_file() and path.suffix != ".part"]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}") from None


def open_place(address: str, key: str) -> Place:
    """Open a folder, or s3://BUCKET/PREFIX; nothing is written yet.

    Args:
        address: The path or address.
        key: What holds it, for messages.

    Raises:
        InputError: The address is invalid.
    """
    if address.startswith("s3://"):
        return BucketPlace(address, key)
    if not address or "://" in address:
        raise InputError(f"{key} {without_password(address)!r}: give a folder or s3://BUCKET/PREFIX")
    return FolderPlace(Path(address))
