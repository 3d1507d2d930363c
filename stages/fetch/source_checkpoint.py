"""The tensors of a checkpoint in the format of its authors -> the components of a diffusers folder."""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from diffusers.models.autoencoders.vq_model import VQModel
from torch import nn

from stages.models.families import FAMILIES
from stages.models.layout import WEIGHTS
from stages.runtime.errors import InputError
from stages.storage.files import write_json
from stages.storage.tensors import write_tensors

Config = Mapping[str, Any]

NAMES = {False: "weights", True: "EMA weights"}
"""Whether a set of weights is the EMA -> its name in messages."""


class SourceCheckpoint:
    """The tensors of a checkpoint; each must be taken, checked or dropped explicitly before `check_empty`.

    Args:
        tensors: Name in the checkpoint -> tensor.
        origin: File that messages name.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], origin: Path) -> None:
        self.tensors, self.origin = dict(tensors), origin

    def take(self, shapes: Mapping[str, torch.Size], rename: Callable[[str], str]) -> dict[str, torch.Tensor]:
        """Remove the tensors of a network from the checkpoint and return them in float32, under diffusers' names.

        Args:
            shapes: Diffusers name -> shape; a linear layer may be a 1×1 convolution in the checkpoint.
            rename: Diffusers name -> name in the checkpoint.

        Raises:
            InputError: A tensor is missing or has another shape.
        """
        return {name: self._take(rename(name), shape).to(torch.float32, copy=True) for name, shape in shapes.items()}

    def _take(self, name: str, shape: torch.Size) -> torch.Tensor:
        if name not in self.tensors:
            raise self.mismatch(f"{name} is missing")
        tensor = self.tensors.pop(name)
        if tensor.shape not in (shape, (*shape, 1, 1)):
            raise self.mismatch(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
        return tensor.reshape(shape)

    def check(self, name: str, expected: torch.Tensor) -> None:
        """Remove a tensor, if the checkpoint has it, and compare it with the value that the system implies.

        Raises:
            InputError: The values differ.
        """
        found = self.tensors.pop(name, expected)
        if found.shape != expected.shape or not torch.allclose(found.float(), expected.float(), rtol=1e-4, atol=0):
            raise self.mismatch(f"{name} differs from that of the system")

    def drop(self, pattern: str) -> None:
        """Remove the tensors whose whole name matches a regular expression."""
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if not re.fullmatch(pattern, name)}

    def check_empty(self) -> None:
        """Check that no tensor is left over.

        Raises:
            InputError: A tensor is left over.
        """
        if self.tensors:
            raise self.mismatch(f"it has an unexpected tensor {min(self.tensors)}")

    def mismatch(self, reason: str) -> InputError:
        """Make the error that the checkpoint does not hold the system."""
        advice = "correct fetch.model.path, .layout or .system"
        return InputError(f"{self.origin} does not hold the system that it should: {reason}; {advice}")


def choose_ema(path: Path, sets: Mapping[bool, Collection[str]], ema: bool | None, *, by_default: bool) -> bool:  # noqa: FBT001
    """Decide whether the EMA weights are taken, and report it.

    Args:
        path: The checkpoint.
        sets: Whether they are the EMA -> the tensors, for each set of weights that the checkpoint holds.
        ema: What the user wants; None takes what the authors draw with, or the only set.
        by_default: Whether the authors draw with the EMA.
    """
    chosen = (by_default if by_default in sets else not by_default) if ema is None else ema
    if chosen not in sets:
        raise InputError(f"{path} holds no {NAMES[chosen]}; set fetch.model.ema to {str(not chosen).lower()} or null")
    other = f", not its {NAMES[not chosen]} (fetch.model.ema)" if len(sets) > 1 else ""
    click.echo(f"{path.name}: {len(sets[chosen])} tensors of its {NAMES[chosen]} are taken{other}")
    return chosen


def tensor_shapes(config: Config) -> dict[str, torch.Size]:
    """List the names and shapes of the tensors of a diffusers network, without allocating it."""
    dense: dict[str, Any] = {name: family.dense for name, family in FAMILIES.items()}
    with torch.device("meta"):
        network: nn.Module = {**dense, "VQModel": VQModel}[config["_class_name"]].from_config(dict(config))
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def write_component(folder: Path, config: Config, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the config and the weights of a component."""
    write_json(folder / "config.json", config)
    write_tensors(folder / WEIGHTS, tensors, metadata={"format": "pt"})


def write_index(folder: Path, pipeline: str, noise: Config, **components: Config) -> None:
    """Write the scheduler's config and model_index.json."""
    classes = {**{name: config["_class_name"] for name, config in components.items()}, "scheduler": "DDPMScheduler"}
    index = {name: ["diffusers", cls] for name, cls in classes.items()}
    write_json(folder / "model_index.json", {"_class_name": pipeline, **index})
    scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "prediction_type": "epsilon", **noise}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
