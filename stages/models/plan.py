"""pruning_plan.json: the channels that a pruning keeps and the settings behind it, sealed by a hash."""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from stages.models.families import Denoiser, family_name
from stages.models.params import Quantity
from stages.runtime.errors import InputError
from stages.runtime.schema import Frozen, Sha256
from stages.runtime.text import printable
from stages.storage.files import read_json

UNITS: dict[Quantity, str] = {"channels": "channels", "macs": "MACs", "params": "parameters", "latency_ms": "ms"}


VERSIONS = [2, 3]
"""Versions of the schema that are read; a list, since the version in a file may be of any type."""


class Budget(Frozen):
    """The requested, the possible and the reached cost."""

    quantity: Quantity
    asked: float
    """The requested cost."""
    found: float
    """The cost that the plan reaches."""
    smallest: float
    """The cost after every cut that round_to, floor, include and exclude allow."""
    dense: float
    """The cost of the dense model; of channels, without the branches that go."""
    setting: str | None = Field(None, exclude_if=lambda setting: setting is None)
    """How a latency was measured; left out for other quantities, whose plans keep their hash."""

    def line(self) -> str:
        """Format the budget as one line: limits, requested and reached cost."""
        show = partial(show_cost, self.quantity)
        limits = f"smallest {show(self.smallest)}, asked {show(self.asked)}, largest {show(self.dense)}"
        return f"{limits}: found {show(self.found)}{f' ({self.setting})' if self.setting else ''}"


def show_cost(quantity: Quantity, cost: float) -> str:
    """Format a cost with its unit: 3.3919 G MACs."""
    large = {"G ": 1e9, "M ": 1e6, "K ": 1e3} if quantity in ("macs", "params") else {}
    prefix, scale = next(((prefix, scale) for prefix, scale in large.items() if cost >= scale), ("", 1.0))
    number = f"{cost:.0f}" if quantity == "channels" else f"{cost / scale:.5g}"
    return f"{number} {prefix}{UNITS[quantity]}"


class Base(Frozen):
    """Identity of the dense model."""

    family: str
    architecture_sha256: Sha256
    """`architecture_sha256` of the dense model: names and shapes of its parameters."""
    weights_sha256: Sha256
    """`tensors_sha256` of its weights."""


class PlannedGroup(Frozen):
    """The cut of one group."""

    root: str
    """Name of the layer where torch-pruning starts the group."""
    width: int
    """Number of channels in the dense model."""
    blocks: int
    """Number of GroupNorm groups or attention heads that must keep equal sizes."""
    cut: list[int]
    """The removed channels, ascending, numbered as in the dense model."""


class KeptChannels(Frozen):
    """The kept channels of one layer, numbered as in the dense model; null for a side that is not cut."""

    outputs: list[int] | None = None
    inputs: list[int] | None = None


class EarlierCut(Frozen):
    """One of the cuts before the last one, of a model that was pruned several times."""

    criterion: str
    formula: str
    seed: int
    prune: dict[str, Any]
    budget: Budget
    replayed_from: Sha256 | None
    result_sha256: Sha256
    """`tensors_sha256` of the weights that the next cut was made in: those of this cut's result, after its recovery."""


class RemovedBranch(Frozen):
    """A residual branch that is gone; the shortcut beside it stays."""

    name: str
    """The module of the branch and its shortcut, in the dense model."""
    kind: str
    """resnet, attention or transformer."""
    macs: int
    """MACs per image that its removal saves in the dense model, as `count_macs` counts them."""
    params: int
    """Parameters that its removal saves in the dense model."""


class Plan(Frozen):
    """pruning_plan.json; docs/plan.md explains each key.

    In the plan of a model that was pruned several times, criterion, formula, seed, prune, budget and replayed_from are
    those of the last cut, and all other fields describe all cuts together.
    """

    version: Literal[2, 3] = 2
    """3 if branches are removed, else 2."""
    base: Base
    criterion: str
    """Name of the importance criterion."""
    formula: str
    """The formula, paper, diffusers or ldm, of the importance."""
    seed: int
    """Seed of the scores of the criterion random."""
    prune: dict[str, Any]
    """The block prune of params.yaml."""
    budget: Budget
    groups: list[PlannedGroup]
    """The groups in the order in which they were cut."""
    layers: dict[str, KeptChannels]
    """Layer name -> its kept channels."""
    heads: dict[str, int]
    """Attention name -> number of kept heads, for attentions that lose whole heads."""
    replayed_from: Sha256 | None = None
    """sha256 of the plan for another checkpoint of the same architecture that this one repeats; null otherwise."""
    removed: list[RemovedBranch] = Field(default=[], exclude_if=lambda branches: not branches)
    """The removed branches in the order of their removal, which comes before the cut of channels; left out without any,
    so that such plans keep their hash."""
    earlier: list[EarlierCut] = Field(default=[], exclude_if=lambda cuts: not cuts)
    """The cuts before the last one, oldest first; left out for a single cut, whose plan keeps its hash."""
    sha256: str = ""
    """Hash of all other fields."""

    @model_validator(mode="after")
    def _check_version(self) -> "Plan":
        if self.version != version_of(self.removed):
            raise ValueError("version 3 lists removed branches, and version 2 has none")
        return self

    def sealed(self) -> "Plan":
        """Return a copy with the hash of all other fields in `sha256`."""
        return self.model_copy(update={"sha256": self.content_sha256()})

    def content_sha256(self) -> str:
        """Hash all fields except `sha256`."""
        content = self.model_dump(mode="json", exclude={"sha256"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Convert the plan to JSON types."""
        return self.model_dump(mode="json")


def version_of(removed: Sequence[RemovedBranch]) -> Literal[2, 3]:
    """Return the version of a plan's schema that can hold what it removes."""
    return 3 if removed else 2


def architecture_sha256(unet: Denoiser) -> str:
    """Hash a model's family and the names and shapes of its parameters."""
    shapes = {name: list(parameter.shape) for name, parameter in unet.named_parameters()}
    return hashlib.sha256(json.dumps([family_name(unet), shapes], sort_keys=True).encode()).hexdigest()


def read_plan(path: Path) -> Plan:
    """Read a plan and check its hash.

    Raises:
        InputError: The file is missing or invalid, has another version, or was changed after it was sealed.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the pruning_plan.json in it")
    content = read_json(path)
    if content.get("version") not in VERSIONS:
        raise InputError(f"{path} has version {content.get('version')!r}; supported: 2, 3; run the prune stage again")
    try:
        plan = Plan.model_validate(content)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        found = printable(f"{where}: {error.errors()[0]['msg']}")
        raise InputError(f"{path} is not a valid pruning plan: {found}") from None
    if plan.sha256 != plan.content_sha256():
        raise InputError(f"{path} was changed after it was written: its sha256 does not match; use the original file")
    return plan
