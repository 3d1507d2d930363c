"""This machine -> the device to compute on, with deterministic kernels."""

import os

import torch


def select_device() -> torch.device:
    """Return the GPU, or the CPU of a machine without one; switch PyTorch to deterministic kernels and full float32."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    # Filling new tensors costs time and changes no result, since every element is written before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.allow_tf32 = False  # convolutions in float32 would otherwise round their inputs to TF32
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
