"""What the folders between the stages hold on disk: written whole or not at all, read with checks."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.runtime.errors import InputError, first_line

if TYPE_CHECKING:
    from pandas import DataFrame

RUN_RECORD = "run.json"


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `folder` when the block ends well, and vanishes when it does not.

    What was there before is replaced only at the end.

    Raises:
        InputError: The place is not free, cannot be written, or the disk is full.
    """
    check_free(folder)
    folder = folder.resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise cannot_write(folder, error) from None
    try:
        yield temporary
        _replace(folder, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def stand_in(origin: Path | str, place: Path) -> Iterator[Path]:
    """Give a temporary folder in `place`; what the block refuses of it is told of `origin`, which can be looked at."""
    with tempfile.TemporaryDirectory(dir=place, prefix=".stand-in.") as home:
        try:
            yield Path(home)
        except InputError as error:
            raise type(error)(error.message.replace(home, str(origin))) from None


def check_free(*folders: Path, inputs: Sequence[Path] = (), stage: str | None = None) -> None:
    """Refuse outputs that would destroy something: an input, each other, or what this stage has not written.

    Args:
        folders: Where outputs go.
        inputs: What must not be touched.
        stage: Who writes there; with None whatever any stage has written may be replaced.

    Raises:
        InputError: An output is neither empty nor this stage's own, or overlaps with another folder.
    """
    for folder, other in itertools.chain(itertools.combinations(folders, 2), itertools.product(folders, inputs)):
        one, two = _resolve(folder), _resolve(other)
        if one.is_relative_to(two) or two.is_relative_to(one):
            raise InputError(f"output {folder} overlaps with {other}; give each a place of its own")
    for folder in folders:
        _check_place(folder)
        ours = (folder / RUN_RECORD).is_file()
        if folder.exists() and not ours and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(
                f"{folder} holds something that no stage has written; move it away or choose another place"
            )
        if stage and ours and (writer := read_json(folder / RUN_RECORD).get("stage")) != stage:
            raise InputError(f"{folder} was written by the stage {writer}; give {stage} another place")


def _resolve(folder: Path) -> Path:
    try:
        return folder.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise InputError(f"cannot write {folder}: {first_line(error)}; choose another place") from None


def _check_place(folder: Path) -> None:
    """Refuse a path that can never become a folder: one below a file, or with a name too long."""
    try:
        blocking = next((parent for parent in folder.absolute().parents if parent.exists()), None)
        folder.exists()
    except OSError as error:
        raise cannot_write(folder, error) from None
    if blocking is not None and not blocking.is_dir():
        raise InputError(f"cannot write {folder}: {blocking} is a file; choose another place")


def _replace(folder: Path, new: Path) -> None:
    """Put `new` where `folder` is; at every moment one of the two is there whole."""
    new.chmod(0o755)
    old = new.with_name(f"{new.name}.old")
    try:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except OSError as error:
        if old.exists():
            old.rename(folder)
        raise cannot_write(folder, error) from None
    shutil.rmtree(old, ignore_errors=True)


def cannot_write(place: Path, error: OSError) -> InputError:
    """Make the error of a place that cannot be written."""
    return InputError(f"cannot write {place}: {error.strerror or error}; free some space or choose another place")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file under another name, flush it to the disk, then rename it: a reader sees all of it or nothing."""
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
    """Copy a file, in pieces.

    Raises:
        InputError: It cannot be read, the place cannot be written, or the disk is full.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise cannot_write(target, error) from None


def read_bytes(path: Path) -> bytes:
    """Read a file whole.

    Raises:
        InputError: It is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; run the stage that writes it again") from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` with sorted keys, so that equal values are equal files."""
    write_atomically(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_csv(path: Path, table: "DataFrame") -> None:
    """Write a table as CSV, with a header and without its index."""
    write_atomically(path, table.to_csv(index=False, lineterminator="\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: The file is missing or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def file_sha256(path: Path) -> str:
    """Hash a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
