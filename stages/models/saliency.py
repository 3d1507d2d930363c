"""The record of the importance stage: a saliency for each weight, and how it was measured."""

from pathlib import Path

import torch
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as checked

from stages.models.params import CriterionName, FormulaName
from stages.runtime.errors import InputError, first_line
from stages.storage.files import read_json, write_json
from stages.storage.tensors import read_tensors, write_tensors


@checked(frozen=True, config=ConfigDict(arbitrary_types_allowed=True, strict=True, extra="forbid"))
class Importance:
    """The saliencies of a model's weights and the settings that they were measured with."""

    criterion: CriterionName
    formula: FormulaName
    model_sha256: str
    """`tensors_sha256` of the measured weights."""
    counts_doubled: bool
    """Whether a layer that reads a channel twice, through a skip connection, contributes to the channel's score."""
    timesteps: list[int]
    """The requested timesteps, ascending."""
    losses: list[list[float]]
    """For each draw of images and noise, the losses L_t of the timesteps that count: a prefix of `timesteps`, with the
    formula diffusers up to the one that ends it."""
    precision: str
    """Precision of losses and gradients: float32, tf32 or bfloat16."""
    saliency: dict[str, torch.Tensor]
    """Layer name -> saliencies, float32 of the weight's shape; empty for the criterion random."""


def write_importance(folder: Path, importance: Importance) -> None:
    """Write the saliencies as safetensors and the rest as importance.json."""
    rest = {key: value for key, value in vars(importance).items() if key != "saliency"}
    write_json(folder / "importance.json", rest)
    write_tensors(folder / "saliency.safetensors", importance.saliency)


def read_importance(folder: Path) -> Importance:
    """Read the record of the importance stage.

    Raises:
        InputError: A file is missing or damaged.
    """
    if not (folder / "importance.json").is_file():
        raise InputError(f"{folder} holds no importance.json; run the importance stage")
    rest, saliency = read_json(folder / "importance.json"), read_tensors(folder / "saliency.safetensors")
    try:
        return Importance(**rest, saliency=saliency)
    except (TypeError, ValidationError) as error:
        reason = first_line(error)
        if isinstance(error, ValidationError):  # its text repeats the saliencies
            reason = ", ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        found = f"{folder / 'importance.json'} does not fit ({reason})"
        raise InputError(f"{found}; run the importance stage again") from None
