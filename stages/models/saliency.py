"""The record of the importance stage: one number for each weight, and how it was measured."""

from pathlib import Path

import torch
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as checked

from stages.models.params import CriterionName, FormulaName
from stages.runtime.errors import InputError
from stages.storage.files import read_json, write_json
from stages.storage.tensors import read_tensors, write_tensors


@checked(frozen=True, config=ConfigDict(arbitrary_types_allowed=True, strict=True, extra="forbid"))
class Importance:
    """What the importance stage found out about a model."""

    criterion: CriterionName
    formula: FormulaName
    model_sha256: str
    """Of the weights that were looked at, by `tensors_sha256`."""
    counts_doubled: bool
    """Whether a layer that reads the same channels twice, through a skip, has a say in their score."""
    timesteps: list[int]
    """Those that were to be used, ascending."""
    losses: list[list[float]]
    """For each draw of images and noise, L_t of the timesteps that counted: the first of `timesteps`."""
    precision: str
    """In which losses and gradients were computed."""
    saliency: dict[str, torch.Tensor]
    """Layer name -> a number for each of its weights, float32 of the weight's shape; empty for random."""


def write_importance(folder: Path, importance: Importance) -> None:
    """Write the saliencies as safetensors and the rest as importance.json."""
    rest = {key: value for key, value in vars(importance).items() if key != "saliency"}
    write_json(folder / "importance.json", rest)
    write_tensors(folder / "saliency.safetensors", importance.saliency)


def read_importance(folder: Path) -> Importance:
    """Read what the importance stage wrote.

    Raises:
        InputError: A file is missing or damaged.
    """
    if not (folder / "importance.json").is_file():
        raise InputError(f"{folder} holds no importance.json; run the importance stage")
    rest, saliency = read_json(folder / "importance.json"), read_tensors(folder / "saliency.safetensors")
    try:
        return Importance(**rest, saliency=saliency)
    except (TypeError, ValidationError) as error:
        found = f"{folder / 'importance.json'} does not fit ({' '.join(str(error).split())[:200]})"
        raise InputError(f"{found}; run the importance stage again") from None
