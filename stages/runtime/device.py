"""This machine and a choice of precision and determinism -> the device to compute on, and the kernels that it runs."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from stages.runtime.environment import WORKSPACE_VARIABLE
from stages.runtime.errors import InputError
from stages.runtime.wording import count

TF32_CAPABILITY = (8, 0)
"""Compute capability of the first GPUs with TF32, Ampere."""
WORKSPACES = (":4096:8", ":16:8")
"""The values of CUBLAS_WORKSPACE_CONFIG under which cuBLAS repeats its results."""
OVERRIDE_VARIABLE = "NVIDIA_TF32_OVERRIDE"
"""Environment variable by which NVIDIA's libraries ignore the precision that a program sets."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Options of glibc's mallopt(3): free bytes at the end of the heap that are given back; most mapped blocks."""
REFUSAL = " does not have a deterministic implementation"
"""What PyTorch says of an operation that it refuses while only deterministic kernels may run."""


def select_device(*, deterministic: bool = True) -> torch.device:
    """Return the GPU, or the CPU of a machine without one; switch PyTorch to full float32 and the kernels to run.

    Strictly deterministic kernels include those of attention's backward pass: flash and memory-efficient attention then
    add in a fixed order, which they do not where PyTorch only warns, and cuDNN's attention is not used. An operation
    without such a kernel raises.

    Args:
        deterministic: Whether only kernels run that repeat their result bit for bit; else PyTorch chooses for speed.

    Raises:
        InputError: An environment variable would break what was chosen.
    """
    if deterministic:
        os.environ.setdefault(WORKSPACE_VARIABLE, WORKSPACES[0])
    torch.use_deterministic_algorithms(deterministic)
    # Filling new tensors costs time and changes no result, since every element is written before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    _allow_tf32(products=False, convolutions=False)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    _check_variables(deterministic=deterministic)
    return torch.device("cuda")


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones; by default it maps it anew, page by page.

    That takes 5 to 9 % of the processor's time of a training step (docs/log.md). Another C library stays as it is.
    Stages that take times do without, as whoever draws with the released model does.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _check_variables(*, deterministic: bool) -> None:
    if (found := os.environ.get(OVERRIDE_VARIABLE)) is not None:
        raise InputError(f"{OVERRIDE_VARIABLE} is {found!r}, which overrides every precision of params.yaml; unset it")
    if deterministic and (found := os.environ[WORKSPACE_VARIABLE]) not in WORKSPACES:
        advice = f"unset it, or set it to {' or '.join(WORKSPACES)}"
        raise InputError(f"{WORKSPACE_VARIABLE} is {found!r}, with which results vary from run to run; {advice}")


@contextmanager
def kernels(*, deterministic: bool) -> Iterator[None]:
    """Run deterministic kernels only, or those that PyTorch chooses for speed, while the block lasts."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@contextmanager
def computing(precision: str) -> Iterator[None]:
    """Compute products and convolutions of float32 tensors on the GPU as tf32 while the block lasts, else in full."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    _allow_tf32(products=precision == "tf32", convolutions=precision == "tf32")
    try:
        yield
    finally:
        _allow_tf32(*before)


def _allow_tf32(products: bool, convolutions: bool) -> None:  # noqa: FBT001
    torch.backends.cuda.matmul.allow_tf32 = products
    torch.backends.cudnn.allow_tf32 = convolutions


def has_tf32(device: torch.device) -> bool:
    """Whether a device computes in tf32 where it is asked to; others silently compute in full float32."""
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    return is_nvidia and torch.cuda.get_device_capability(device) >= TF32_CAPABILITY


def check_precision(precision: str, key: str, device: torch.device) -> None:
    """Check that a device has a precision.

    Args:
        precision: float32, tf32 or bfloat16.
        key: Where params.yaml says so, for the message.
        device: Where the work is done.

    Raises:
        InputError: It would compute in another one.
    """
    if precision == "tf32" and not has_tf32(device):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        needed = "an NVIDIA GPU of compute capability 8.0 or more"
        raise InputError(f"{key} is tf32, which needs {needed}, and this is {name}; set it to float32 or bfloat16")


@contextmanager
def naming_switch(key: str) -> Iterator[None]:
    """Name the switch of params.yaml where PyTorch refuses an operation that has no deterministic kernel.

    Raises:
        InputError: It did.
    """
    try:
        yield
    except RuntimeError as error:
        operation, refusal, _ = str(error).partition(REFUSAL)
        if not refusal:
            raise
        raise InputError(f"{operation} has no deterministic kernel on this device; set {key} to false") from None


def device_name() -> str:
    """Name the device that times are taken on: the GPU, or the processor and the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cpu_name()}, {count(torch.get_num_threads(), 'thread')}"


def cpu_name(source: Path = Path("/proc/cpuinfo")) -> str:
    """Name of the processor, since times on different processors do not compare; "CPU" where it is unknown."""
    lines = source.read_text().splitlines() if source.is_file() else []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, "") or platform.processor() or "CPU"
