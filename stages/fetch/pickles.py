"""A file of torch.save -> its tensors, without running any code that it holds."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

from stages.models.layout import AUTOENCODERS, CLASS_EMBEDDING, WEIGHTS
from stages.models.pipeline import component, rename_attention
from stages.runtime.errors import InputError, first_line
from stages.storage.files import check_not_pointer, temporary_folder
from stages.storage.tensors import write_tensors

BIN = "diffusion_pytorch_model.bin"
"""Name of the weights in diffusers folders that predate safetensors."""
OPTIONAL_COMPONENTS = (*AUTOENCODERS, CLASS_EMBEDDING)
"""Components with weights that a pipeline may have in addition to the UNet."""
LINKED_SUFFIXES = {".json", ".md", ".safetensors"}


class Ignored:
    """Replaces a class that Lightning checkpoints name, as the key of a callback's state, and never instantiate."""


CALLBACK = (Ignored, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")


def read_pickle(path: Path) -> Any:  # noqa: ANN401  # a file can hold any plain value
    """Read a torch.save file of tensors, plain values and containers; tensors of a zip file are memory-mapped.

    Raises:
        InputError: The file is missing or damaged, or holds anything else, which might run code.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist")
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
        if (
            not isinstance(name, str)
            or type(tensor) not in (torch.Tensor, torch.nn.Parameter)
            or tensor.layout != torch.strided
        ):
            kind = type(tensor).__name__
            raise InputError(f"{origin} holds a {kind} under {name!r}; supported: dense tensors only, with names")
    return value


def components_without_safetensors(folder: Path) -> list[Path]:
    """List the component folders of a pipeline that have no safetensors file."""
    optional = [folder / name for name in OPTIONAL_COMPONENTS if (folder / name).is_dir()]
    return [path for path in (component(folder, "unet"), *optional) if not (path / WEIGHTS).is_file()]


def unet_weights(folder: Path) -> Path:
    """Find the file that the UNet's weights are read from: safetensors, or the .bin if there are no safetensors.

    Raises:
        InputError: Neither file exists.
    """
    unet = component(folder, "unet")
    for name in (WEIGHTS, BIN):
        if (unet / name).is_file():
            return unet / name
    raise InputError(f"{unet / WEIGHTS} does not exist, and neither does {BIN} beside it; complete the folder")


@contextmanager
def with_safetensors(folder: Path, place: Path) -> Iterator[Path]:
    """Yield a pipeline folder with safetensors: `folder`, or a temporary copy in `place` with its .bin converted.

    Raises:
        InputError: A .bin is damaged or holds more than tensors.
    """
    pickled = [path for path in components_without_safetensors(folder) if (path / BIN).is_file()]
    if not pickled:
        yield folder
        return
    with temporary_folder(folder, place) as copy:
        for file in (file for file in chain(folder.glob("*"), folder.glob("*/*")) if file.suffix in LINKED_SUFFIXES):
            link = copy / file.relative_to(folder)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(file.resolve())
        for path in pickled:
            tensors = check_state_dict(read_pickle(path / BIN), path / BIN)
            renamed = {rename_attention(name): tensor.clone() for name, tensor in tensors.items()}
            write_tensors(copy / path.relative_to(folder) / WEIGHTS, renamed, metadata={"format": "pt"})
        yield copy
