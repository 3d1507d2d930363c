"""The record of one pruning on disk: what was kept, why and of what; sealed by a hash and checked when read."""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from stages.models.families import Denoiser, family_name
from stages.models.params import Quantity
from stages.runtime.errors import InputError
from stages.runtime.schema import Frozen, Sha256
from stages.storage.files import read_json

UNITS: dict[Quantity, str] = {"channels": "channels", "macs": "MACs", "params": "parameters", "latency_ms": "ms"}


class Budget(Frozen):
    """What was asked for, what was possible, what was found."""

    quantity: Quantity
    asked: float
    found: float
    smallest: float
    """With every cut made that round_to, floor, include and exclude allow."""
    dense: float

    def line(self) -> str:
        """Write it as one line: what could be had, what was asked for, what was found."""
        show = partial(show_cost, self.quantity)
        limits = f"smallest {show(self.smallest)}, asked {show(self.asked)}, largest {show(self.dense)}"
        return f"{limits}: found {show(self.found)}"


def show_cost(quantity: Quantity, cost: float) -> str:
    """Write a cost with its unit: 3.3919 G MACs."""
    large = {"G ": 1e9, "M ": 1e6, "K ": 1e3} if quantity in ("macs", "params") else {}
    prefix, scale = next(((prefix, scale) for prefix, scale in large.items() if cost >= scale), ("", 1.0))
    return f"{cost / scale:.5g} {prefix}{UNITS[quantity]}"


class Base(Frozen):
    """The dense model."""

    family: str
    architecture_sha256: Sha256
    """Of the names and shapes of its parameters, by `architecture_sha256`."""
    weights_sha256: Sha256
    """Of its weights, by `tensors_sha256`."""


class PlannedGroup(Frozen):
    """What happens to one group."""

    root: str
    width: int
    blocks: int
    cut: list[int]
    """Channels that go, ascending, in dense numbering."""


class KeptChannels(Frozen):
    """What stays of one layer, in dense numbering; null where a side is left whole."""

    outputs: list[int] | None = None
    inputs: list[int] | None = None


class Plan(Frozen):
    """pruning_plan.json; docs/plan.md explains each key."""

    version: Literal[2] = 2
    base: Base
    criterion: str
    formula: str
    seed: int
    """Of the scores of the criterion random."""
    prune: dict[str, Any]
    """The block prune of params.yaml that made the plan."""
    budget: Budget
    groups: list[PlannedGroup]
    """In the order in which they were visited."""
    layers: dict[str, KeptChannels]
    heads: dict[str, int]
    """Attention -> heads that stay, where whole heads went."""
    replayed_from: Sha256 | None = None
    """The plan that was made for another checkpoint of the same architecture."""
    sha256: str = ""
    """Of all the rest."""

    def sealed(self) -> "Plan":
        """Write the hash of all the rest into `sha256`."""
        return self.model_copy(update={"sha256": self.content_sha256()})

    def content_sha256(self) -> str:
        """Hash everything but `sha256`."""
        content = self.model_dump(mode="json", exclude={"sha256"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Give the plan as `write_json` takes it."""
        return self.model_dump(mode="json")


def architecture_sha256(unet: Denoiser) -> str:
    """Hash the names and shapes of a model's parameters, and the class that they belong to."""
    shapes = {name: list(parameter.shape) for name, parameter in unet.named_parameters()}
    return hashlib.sha256(json.dumps([family_name(unet), shapes], sort_keys=True).encode()).hexdigest()


def read_plan(path: Path) -> Plan:
    """Read a plan and check its hash.

    Raises:
        InputError: The file is missing, is no plan of a version known here, or was changed after it was sealed.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the pruning_plan.json in it")
    content = read_json(path)
    if content.get("version") != Plan.model_fields["version"].default:
        raise InputError(f"{path} has version {content.get('version')!r}; known: 2; prune again with this program")
    try:
        plan = Plan.model_validate(content)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise InputError(f"{path} is no pruning plan: {where}: {error.errors()[0]['msg']}") from None
    if plan.sha256 != plan.content_sha256():
        raise InputError(f"{path} was changed after it was written: its sha256 does not fit; use the original file")
    return plan
