"""Tensors and arrays <-> safetensors and .npy files."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from stages.runtime.bounded import check_regular
from stages.runtime.errors import InputError, first_line
from stages.storage.files import cannot_write, check_not_pointer, write_atomically


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as one safetensors file, sorted by name, so that equal tensors give equal files."""
    content = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    write_atomically(path, save(content, metadata=metadata))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        InputError: The file is missing or truncated, or is not a safetensors file.
    """
    with _safetensors_errors(path):
        return load_file(path)


def read_shapes(path: Path) -> dict[str, list[int]]:
    """Read the shapes of a safetensors file's tensors: name -> shape; the tensors themselves are not loaded."""
    with _safetensors_errors(path), safe_open(path, framework="pt") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # safe_open is not iterable


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file; its tensors are not loaded."""
    with _safetensors_errors(path), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


@contextmanager
def _safetensors_errors(path: Path) -> Iterator[None]:
    check_regular(path)
    try:
        path.open("rb").close()  # safetensors reports every file that it cannot open as one that does not exist
        yield
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        check_not_pointer(path)
        raise InputError(f"{path} is not a whole safetensors file ({error}); fetch or write it again") from None


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 over every tensor's name, type, shape and content, independent of order and memory layout."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def read_array(path: Path) -> NDArray[Any]:
    """Memory-map the array of a .npy file.

    Raises:
        ValueError: It is missing or damaged, is shorter than its header says, or holds several arrays or objects.
        InputError: It is a pipe, device or socket.
    """
    check_regular(path)
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # noqa: BLE001  # a damaged header can raise any exception
        raise ValueError(first_line(error)) from None
    if not isinstance(array, np.ndarray):
        raise ValueError("several arrays in one file")  # noqa: TRY004  # a wrong file
    return array


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as .npy, without pickle.

    Raises:
        InputError: The path cannot be written, or the disk is full.
    """
    try:
        np.save(path, array, allow_pickle=False)
    except OSError as error:
        raise cannot_write(path, error) from None


def write_blocks(path: Path, blocks: Iterable[NDArray[Any]]) -> tuple[int, ...]:
    """Write an array as .npy from blocks along its first axis, holding one block at a time in memory.

    Args:
        path: The .npy file.
        blocks: At least one array [B, …]; B may vary.

    Returns:
        The shape of the whole array.

    Raises:
        InputError: The path cannot be written, or the disk is full.
    """
    remaining = iter(blocks)
    first, length = next(remaining), 0
    header = {"descr": np.lib.format.dtype_to_descr(first.dtype), "fortran_order": False}
    try:
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {**header, "shape": first.shape})
            for block in itertools.chain([first], remaining):
                np.ascontiguousarray(block).tofile(file)
                length += len(block)
            file.seek(0)  # numpy pads the header, so a longer first axis fits
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (length, *first.shape[1:])})
    except OSError as error:
        raise cannot_write(path, error) from None
    return (length, *first.shape[1:])
