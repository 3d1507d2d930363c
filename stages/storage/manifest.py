"""The list of the files of a folder, with their sizes and hashes <-> JSON of bounded size."""

import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from stages.runtime.bounded import MIB, parse_json
from stages.runtime.errors import InputError
from stages.runtime.schema import Frozen, Sha256
from stages.runtime.text import printable
from stages.storage.files import file_sha256

MAX_BYTES, MAX_FILES = 16 * MIB, 50_000
"""Largest manifest, and most files in it."""
MAX_PARTS, MAX_PART_BYTES, MAX_PATH_BYTES = 32, 255, 1024
"""Most folders of a path, and most bytes of one of them and of the path; no more than file systems and S3 allow."""


def check_inside(path: str) -> str:
    """Return a path, if it stays inside a folder and file systems take it.

    Raises:
        ValueError: It does not.
    """
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        raise ValueError(f"{path!r} leads out of the folder")
    if "\\" in path or not path.isprintable() or not pure.parts or str(pure) != path:
        raise ValueError(f"{path!r} is no plain path of printable names without \\")
    parts = [len(part.encode()) for part in pure.parts]
    if len(parts) > MAX_PARTS or max(parts) > MAX_PART_BYTES or len(path.encode()) > MAX_PATH_BYTES:
        limits = f"{MAX_PARTS} folders, names of {MAX_PART_BYTES} bytes, {MAX_PATH_BYTES} bytes in all"
        raise ValueError(
            f"a path of {len(parts)} folders and {len(path.encode())} bytes is too long; allowed: {limits}"
        )
    return path


class Entry(Frozen):
    """One file of a folder."""

    path: Annotated[str, AfterValidator(check_inside)]
    """Relative to the folder, with slashes."""
    sha256: Sha256
    size_bytes: int = Field(ge=0)


class Manifest(Frozen):
    """The files of one folder."""

    version: Literal[1] = 1
    files: list[Entry] = Field(max_length=MAX_FILES)

    @model_validator(mode="after")
    def _has_one_file_at_each_path(self) -> Self:
        check_distinct([entry.path for entry in self.files])
        return self


def check_distinct(paths: Sequence[str]) -> None:
    """Check that paths can be files beside one another.

    Raises:
        ValueError: One occurs twice, or is a folder of another.
    """
    known = set(paths)
    if len(known) < len(paths):
        ordered = sorted(paths)
        twice = next(path for path, following in pairwise(ordered) if path == following)
        raise ValueError(f"{twice} is listed twice")
    for path in paths:
        if blocking := next((str(parent) for parent in PurePosixPath(path).parents if str(parent) in known), None):
            raise ValueError(f"{blocking} is listed as a file and as a folder")


def parse_manifest(content: bytes) -> Manifest:
    """Parse a manifest.

    Raises:
        ValueError: It is no manifest or passes a limit; the message has one line.
    """
    if len(content) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // MIB} MiB, the limit")
    try:
        return Manifest.model_validate(parse_json(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(printable(f"{where}: {first['msg']}" if where else first["msg"])) from None


def describe(path: Path, folder: Path) -> Entry:
    """Return the entry of one file of a folder, with its hash and size."""
    return Entry(path=path.relative_to(folder).as_posix(), sha256=file_sha256(path), size_bytes=path.stat().st_size)


def check_name(name: str) -> None:
    """Check the name of a manifest.

    Raises:
        InputError: It leads out of the store, or is too long.
    """
    try:
        check_inside(name)
    except ValueError as error:
        raise InputError(f"{error}; give a name such as checkpoints/RUN/step-00000050") from None


def check_space(manifest: Manifest, folder: Path, origin: str) -> None:
    """Check that the files of a manifest fit on the disk of a folder that does not exist yet.

    Raises:
        InputError: They do not.
    """
    num_bytes = sum(entry.size_bytes for entry in manifest.files)
    place = next(parent for parent in folder.absolute().parents if parent.is_dir())
    if num_bytes > (free := shutil.disk_usage(place).free):
        found = f"{origin} has {num_bytes} bytes, and {free} are free at {place}"
        raise InputError(f"{found}: No space left on device; free some space")
