"""Files and folders on disk: written atomically, read with checks."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from stages.runtime.bounded import MAX_JSON_BYTES, parse_json, read_bounded
from stages.runtime.errors import InputError, first_line
from stages.runtime.text import printable

if TYPE_CHECKING:
    from pandas import DataFrame

RUN_RECORD = "run.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of a disk that takes nothing more."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""The first bytes of what Git LFS puts in place of a file."""
Record = TypeVar("Record", bound=BaseModel)


@contextmanager
def writing(folder: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder that replaces `folder` when the block succeeds and is deleted when it fails.

    Args:
        folder: The output.
        temporary: The temporary folder beside it, whose content is lost; None gives it a new name.

    Raises:
        InputError: `folder` holds files that no stage wrote or cannot be written, or the disk is full.
    """
    check_free(folder)
    folder = folder.resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if temporary is None:
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        else:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(mode=0o700)
    except OSError as error:
        raise cannot_write(folder, error) from None
    try:
        yield temporary
        check_free(folder)  # the block may have taken hours
        _replace(folder, temporary)
    except OSError as error:  # of a library's writer in the block
        if error.errno in FULL:
            other = error.filename and not Path(error.filename).is_relative_to(temporary)
            raise cannot_write(Path(error.filename) if other else folder, error) from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def temporary_folder(origin: Path | str, place: Path) -> Iterator[Path]:
    """Yield a temporary folder for what was downloaded or converted from `origin`.

    An InputError of the block names `origin` in place of the folder, which no longer exists when the user reads it.

    Args:
        origin: Path or address of the original.
        place: Parent of the temporary folder.
    """
    with tempfile.TemporaryDirectory(dir=place, prefix=".temporary.") as folder:
        try:
            yield Path(folder)
        except InputError as error:
            raise type(error)(error.message.replace(folder, str(origin))) from None


def check_free(*folders: Path, inputs: Sequence[Path] = (), stage: str | None = None) -> None:
    """Refuse outputs that would destroy an input, another output or files that this stage did not write.

    Args:
        folders: Output folders.
        inputs: Input folders.
        stage: The stage or command that writes; None allows to replace the output of any.

    Raises:
        InputError: An output holds files that this stage did not write, overlaps with another folder, or cannot
            be a folder.
    """
    for folder, other in itertools.chain(itertools.combinations(folders, 2), itertools.product(folders, inputs)):
        one, two = _resolve(folder), _resolve(other)
        if one.is_relative_to(two) or two.is_relative_to(one):
            raise InputError(f"output {folder} overlaps with {other}; give each its own folder")
    for folder in folders:
        _check_path(folder)
        try:
            has_record = (folder / RUN_RECORD).is_file()
            holds_files = folder.exists() and not has_record and (not folder.is_dir() or any(folder.iterdir()))
        except OSError as error:  # one may not enter it
            raise cannot_write(folder, error) from None
        if holds_files:
            raise InputError(f"{folder} holds files that no stage wrote; move them away or choose another folder")
        if stage and has_record and (writer := read_json(folder / RUN_RECORD).get("stage")) != stage:
            raise InputError(f"{folder} was written by {writer}; give {stage} another folder")


def make_private(folder: Path) -> None:
    """Make a folder that only its owner may enter; an existing one is closed to others, unless it belongs to another.

    Raises:
        InputError: It cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    with contextlib.suppress(PermissionError):
        folder.chmod(0o700)


def _resolve(folder: Path) -> Path:
    try:
        return folder.resolve()
    except (OSError, RuntimeError) as error:  # symbolic links in a circle
        raise InputError(f"cannot write {folder}: {first_line(error)}; choose another folder") from None


def _check_path(folder: Path) -> None:
    """Refuse a path that cannot be a folder: below a file, of a name that is too long, or with .. behind a missing one.

    Python resolves such a .. although the folder before it does not exist, so what lies there would seem not to.
    """
    before = [Path(*folder.parts[:depth]) for depth, part in enumerate(folder.parts) if part == ".."]
    if missing := [parent for parent in before if not parent.is_dir()]:
        raise InputError(f"cannot write {folder}: {missing[0]} does not exist; write the path without ..")
    try:
        blocking = next((parent for parent in folder.absolute().parents if parent.exists()), None)
        folder.exists()
    except OSError as error:
        raise cannot_write(folder, error) from None
    if blocking is not None and not blocking.is_dir():
        raise InputError(f"cannot write {folder}: {blocking} is a file; choose another folder")


def _replace(folder: Path, new: Path) -> None:
    """Replace `folder` with `new` by renaming; if that fails, the old folder is restored."""
    new.chmod(0o755)
    old = new.with_name(f"{new.name}.old")
    try:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)  # of a process that was killed here
            folder.rename(old)
        new.rename(folder)
    except OSError as error:
        if old.exists():
            old.rename(folder)
        raise cannot_write(folder, error) from None
    shutil.rmtree(old, ignore_errors=True)


def cannot_write(path: Path, error: OSError) -> InputError:
    """Make the error for a path that cannot be written."""
    return InputError(f"cannot write {path}: {error.strerror or error}; free some space or choose another folder")


def cannot_lock(path: Path, error: OSError, remedy: str) -> InputError:
    """Make the error for a file that the system does not lock for a reason other than that somebody else has the lock.

    Args:
        path: The file.
        error: What the system says.
        remedy: What the user can do.
    """
    return InputError(f"cannot lock {path}: {error.strerror or error}; {remedy}")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to the disk and rename it, so that no reader sees a part of it.

    Processes that may write one path at the same time hold a lock meanwhile.

    Raises:
        InputError: The path cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from None


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, and make the folder that it goes to.

    Raises:
        InputError: The source cannot be read, the target cannot be written, or the disk is full.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        if str(error.filename) == str(source):
            raise InputError(f"cannot read {source}: {error.strerror}; complete the folder") from None
        raise cannot_write(target, error) from None


def read_bytes(path: Path, max_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Read a file.

    Raises:
        InputError: The file is missing, cannot be read, or is larger than `max_bytes`, by default 64 MiB.
    """
    try:
        return read_bounded(path, max_bytes)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; run the stage that writes it again") from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object as `json_bytes` formats it."""
    write_atomically(path, json_bytes(value))


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Format a JSON object with sorted keys, so that equal values give equal files."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def write_csv(path: Path, table: "DataFrame") -> None:
    """Write a table as CSV, with a header and without its index."""
    write_atomically(path, table.to_csv(index=False, lineterminator="\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: The file is missing, is not valid JSON, or holds another type of value.
    """
    try:
        value = parse_json(read_bounded(path, MAX_JSON_BYTES))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        check_not_pointer(path)
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def read_record(path: Path, kind: type[Record], remedy: str) -> Record:
    """Read a JSON object as a record.

    Args:
        path: The file.
        kind: The class of the record.
        remedy: What the user can do if the file is not such a record.

    Raises:
        InputError: The file is missing, is not valid JSON, or is not such a record.
    """
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        raise InputError(f"{path} is damaged ({printable(found)}); {remedy}") from None


def check_not_pointer(path: Path) -> None:
    """Refuse what Git LFS puts in place of a file that it has not downloaded.

    Raises:
        InputError: The file is such a pointer.
    """
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise InputError(f"{path} is a pointer of Git LFS and not the file itself; run: git lfs pull")


def file_sha256(*paths: Path, more: bytes = b"") -> str:
    """Return the SHA-256 of the contents of files in this order, and of `more` behind them, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)
    digest.update(more)
    return digest.hexdigest()


def folder_sha256(folder: Path) -> str:
    """Return the SHA-256 of the names and contents of all files of a folder, in hexadecimal."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(os.fsencode(path.relative_to(folder).as_posix()) + f" {file_sha256(path)}\n".encode())
    return digest.hexdigest()
