"""Arrays and tensors in files whose rows several processes write as they come, in any order."""

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from stages.runtime.processes import Processes, shared_folder
from stages.storage.files import cannot_write, writing


@dataclass(frozen=True)
class RowFile:
    """An array in a file, or one of several; no part of it stays in memory."""

    path: Path
    header: bytes
    """The beginning of the file, before all arrays."""
    offset: int
    """Bytes before this array."""
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def create(self) -> None:
        """Make the file, or make it long enough for this array too.

        Raises:
            InputError: The path cannot be written, or the disk is full.
        """
        end = self.offset + self.dtype.itemsize * math.prod(self.shape)
        try:
            with self.path.open("ab") as file:
                if not file.tell():
                    file.write(self.header)
                if file.tell() < end:
                    file.truncate(end)
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def write(self, start: int, rows: NDArray[Any]) -> None:
        """Write rows [n, …] over those from `start` on, counted in C order where a row has fewer axes than the array's.

        Raises:
            InputError: The disk is full.
        """
        content = np.ascontiguousarray(rows, self.dtype)
        try:
            with self.path.open("r+b") as file:
                file.seek(self.offset + start * content[:1].nbytes)
                file.write(content.data)
        except OSError as error:
            raise cannot_write(self.path, error) from None

    def read(self) -> NDArray[Any]:
        """Return the array, memory-mapped."""
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


def array_file(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> RowFile:
    """Describe a .npy file, equal to the one that `write_array` writes."""
    header, kind = BytesIO(), np.dtype(dtype)
    entries = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, entries)
    return RowFile(path, header.getvalue(), len(header.getvalue()), kind, shape)


def tensors_file(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, RowFile]:
    """Describe the float32 tensors of a safetensors file, equal to the one that `write_tensors` writes."""
    ends = np.cumsum([4 * math.prod(shapes[name]) for name in sorted(shapes)]).tolist()
    places = dict(zip(sorted(shapes), zip([0, *ends], ends, strict=False), strict=True))
    entries = {
        name: {"dtype": "F32", "shape": list(shapes[name]), "data_offsets": list(place)}
        for name, place in places.items()
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return {
        name: RowFile(path, header, len(header) + begin, np.dtype(np.float32), tuple(shapes[name]))
        for name, (begin, _) in places.items()
    }


def create_together(files: Iterable[RowFile], processes: Processes) -> None:
    """Make files that all processes write to: the main process makes them, the others wait.

    Raises:
        InputError: As of `RowFile.create`.
    """
    if processes.is_main:
        for file in files:
            file.create()
    processes.wait()


@contextmanager
def writing_together(folder: Path, processes: Processes) -> Iterator[Path]:
    """Yield one temporary folder to all processes of a stage; the main one moves it to `folder`, as `writing` does.

    The block of the main process must end after the others have written, for which `processes.wait` is there.

    Raises:
        InputError: As of `writing`.
    """
    temporary = shared_folder(folder) if processes.count > 1 else None
    if processes.is_main:
        with writing(folder, temporary) as made:
            processes.wait()
            yield made
    else:
        processes.wait()
        assert temporary
        yield temporary


@contextmanager
def scratch_folder(folder: Path, processes: Processes) -> Iterator[Path]:
    """Yield a folder below one that all processes see; the main process removes it."""
    scratch = folder / "scratch"
    if processes.is_main:
        scratch.mkdir()
    processes.wait()
    yield scratch
    if processes.is_main:
        shutil.rmtree(scratch)
