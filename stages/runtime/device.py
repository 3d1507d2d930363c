"""This machine -> the device to compute on, set to repeat itself."""

import os

import torch


def select_device() -> torch.device:
    """Choose the GPU where there is one, and deterministic kernels everywhere they exist."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    # Filling every new tensor costs time, and nothing is read that was not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, on a GPU too
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
