"""What torch.save wrote -> its tensors, and nothing of it run."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

from stages.models.layout import CLASS_EMBEDDING, CODECS, WEIGHTS
from stages.models.pipeline import component, rename_attention
from stages.runtime.errors import InputError, first_line
from stages.storage.files import temporary_folder
from stages.storage.tensors import write_tensors

BIN = "diffusion_pytorch_model.bin"
"""How diffusers called the weights before it took to safetensors."""
BESIDE = (*CODECS, CLASS_EMBEDDING)
"""Components that may lie beside a UNet."""
KEPT = {".json", ".md", ".safetensors"}


class Ignored:
    """Stands in for a class whose name is all that a checkpoint of Lightning holds of it: a key of its callbacks."""


CALLBACK = (Ignored, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")


def read_pickle(path: Path) -> Any:  # noqa: ANN401  # a file holds what it holds
    """Read a file of torch.save that holds tensors, plain values and containers of them; the tensors stay on the disk.

    Raises:
        InputError: It is missing, not whole, or holds anything else, which might run code.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        with torch.serialization.safe_globals([CALLBACK]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except Exception as error:  # noqa: BLE001  # a damaged pickle can end anywhere
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            held = f"{path} holds {found[1]}, which might run code"
            raise InputError(f"{held}; supported: tensors alone, as torch.save(model.state_dict(), …)") from None
        reason = re.search(r"WeightsUnpickler error: (.*)", str(error))
        told = reason[1] if reason else first_line(error)
        raise InputError(f"{path} is not a whole file of torch.save ({told}); fetch it again") from None


def only_tensors(value: Any, origin: Path | str) -> dict[str, torch.Tensor]:  # noqa: ANN401
    """Make sure that a value is a state dict.

    Raises:
        InputError: It is something else, or holds something else.
    """
    if not isinstance(value, dict) or not value:
        raise InputError(f"{origin} holds a {type(value).__name__} in place of a state dict; use another file")
    for name, tensor in value.items():
        if (
            not isinstance(name, str)
            or type(tensor) not in (torch.Tensor, torch.nn.Parameter)
            or tensor.layout != torch.strided
        ):
            kind = type(tensor).__name__
            raise InputError(f"{origin} holds a {kind} under {name!r}; supported: tensors alone, by their names")
    return value


def lacking(folder: Path) -> list[Path]:
    """List the components of a pipeline folder that have no safetensors."""
    homes = [component(folder, "unet"), *(folder / name for name in BESIDE if (folder / name).is_dir())]
    return [home for home in homes if not (home / WEIGHTS).is_file()]


def weights_that_count(folder: Path) -> Path:
    """Find the file that the weights of a UNet are read from: the .bin only where there are no safetensors.

    Raises:
        InputError: There is neither.
    """
    home = component(folder, "unet")
    for name in (WEIGHTS, BIN):
        if (home / name).is_file():
            return home / name
    raise InputError(f"{home / WEIGHTS} does not exist, nor {BIN} in its place; complete the folder")


@contextmanager
def unpickled(folder: Path, place: Path) -> Iterator[Path]:
    """Give a pipeline folder whose weights are safetensors: itself, or one made of it in `place` for a while.

    Raises:
        InputError: A .bin is not whole or holds more than tensors.
    """
    homes = [home for home in lacking(folder) if (home / BIN).is_file()]
    if not homes:
        yield folder
        return
    with temporary_folder(folder, place) as copy:
        for file in (file for file in chain(folder.glob("*"), folder.glob("*/*")) if file.suffix in KEPT):
            link = copy / file.relative_to(folder)
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(file.resolve())
        for home in homes:
            tensors = only_tensors(read_pickle(home / BIN), home / BIN)
            renamed = {rename_attention(name): tensor.clone() for name, tensor in tensors.items()}
            write_tensors(copy / home.relative_to(folder) / WEIGHTS, renamed, metadata={"format": "pt"})
        yield copy
