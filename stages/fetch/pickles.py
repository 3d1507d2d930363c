"""A file of torch.save -> its tensors, without running any code that it holds."""

import re
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

from stages.runtime.errors import InputError, first_line
from stages.storage.files import check_not_pointer

BIN = "diffusion_pytorch_model.bin"
"""Name of the weights in diffusers folders that predate safetensors."""


class Ignored:
    """Replaces a class that Lightning checkpoints name, as the key of a callback's state, and never instantiate."""


CALLBACK = (Ignored, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")


def read_pickle(path: Path) -> Any:  # noqa: ANN401  # a file can hold any plain value
    """Read a torch.save file of tensors, plain values and containers; tensors of a zip file are memory-mapped.

    Raises:
        InputError: The file is missing or damaged, or holds anything else, which might run code.
    """
    if not path.is_file():
        raise InputError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; correct its path")
    try:
        with torch.serialization.safe_globals([CALLBACK]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # noqa: BLE001  # a damaged pickle can raise any exception
        check_not_pointer(path)
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            held = f"{path} holds {found[1]}, which might run code"
            raise InputError(f"{held}; supported: tensors only, as torch.save(model.state_dict(), …)") from None
        found = re.search(r"WeightsUnpickler error:\s*(\S.*)", str(error))
        reason = found[1] if found else first_line(error)
        raise InputError(f"{path} is not a complete torch.save file ({reason}); fetch it again") from None


def check_state_dict(value: Any, origin: Path) -> dict[str, torch.Tensor]:  # noqa: ANN401
    """Return `value` if it is a state dict.

    Raises:
        InputError: It is not a dict, is empty, or holds something other than dense tensors with names.
    """
    if not isinstance(value, dict) or not value:
        kind = "an empty dict" if isinstance(value, dict) else f"a {type(value).__name__}"
        raise InputError(f"{origin} holds {kind}, expected a state dict; use another file")
    for name, tensor in value.items():
        if not isinstance(name, str) or not _is_plain(tensor):
            kind = type(tensor).__name__
            raise InputError(f"{origin} holds a {kind} under {name!r}; supported: dense tensors only, with names")
    num_bytes = sum(tensor.nbytes for tensor in value.values())
    if num_bytes > origin.stat().st_size:  # views of one storage, or of one number
        found = f"{origin} describes {num_bytes} bytes of tensors in {origin.stat().st_size} bytes"
        raise InputError(f"{found}; supported: tensors that do not share memory")
    return value


def _is_plain(tensor: object) -> bool:
    """Whether a value is a tensor of real numbers that its file holds, one by one."""
    if not isinstance(tensor, torch.Tensor) or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return False
    is_dense = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_complex() or tensor.is_nested)
    return is_dense and tensor.device.type == "cpu"
