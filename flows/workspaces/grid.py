"""A grid over params.yaml -> the cells of a sweep, each allowed."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flows.workspaces.overrides import Overrides, check_order, check_replaced, overlap, write
from flows.workspaces.repository import ParamsSource, Repository
from stages.runtime.errors import InputError

MODEL = "fetch.model"
"""The block that chooses the dense model."""
MEASURING = ("fetch", "reference")
"""Blocks whose keys are part of the protocol, but for the model and `BATCH_SIZE`."""
BATCH_SIZE = "reference.batch_size"
"""The key of the reference that changes no result."""
Grid = Mapping[str, Sequence[Any]]
"""Dotted keys of params.yaml -> the values of each."""


@dataclass(frozen=True)
class PlannedCell:
    """One compression of a series."""

    label: str
    """Name for people."""
    overrides: Overrides
    about: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of its cell.json."""


def combine(grid: Grid) -> list[dict[str, Any]]:
    """Combine every value of every key of a grid with every other: the overrides of each cell, in order, each once.

    Raises:
        InputError: The grid has no cells.
    """
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"the grid has no cells, since {key} has no list of values; give it one or more")
    if not grid:
        raise InputError("the grid has no cells; give at least one --grid KEY=VALUE,VALUE")
    distinct = ({json.dumps(value, default=str): value for value in values}.values() for values in grid.values())
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*distinct)]


def plan_sweep(repository: Repository, source: ParamsSource, grid: Grid, overrides: Overrides) -> list[PlannedCell]:
    """Plan every cell of a sweep, and check its params before anything is cloned.

    Args:
        repository: Where the commit is found.
        source: The params file that the cells change.
        grid: The values of each key.
        overrides: Dotted keys -> one value, for all cells.

    Raises:
        InputError: The grid is not allowed (`check_grid`), or a value is not.
    """
    combined = combine(grid)
    check_grid(grid, overrides)
    cells = [PlannedCell(write(cell), {**overrides, **cell}) for cell in combined]
    repository.render(source, [cell.overrides for cell in cells])
    return cells


def check_grid(grid: Grid, overrides: Overrides) -> None:
    """Check that the cells of a sweep can be compared, and that every key has an effect.

    Raises:
        InputError: The dense model or the protocol is varied, or a varied key replaces a fixed one or a varied one
            before it.
    """
    for key in (key for key, values in grid.items() if len(values) > 1):
        _check_comparable(key)
    check_replaced(grid, overrides, "--grid", "--set")
    check_order(grid, "--grid")


def _check_comparable(key: str) -> None:
    """Check that a varied key leaves the dense model and the protocol as they are.

    Raises:
        InputError: It does not.
    """
    if overlap(key, MODEL):
        found = f"--grid {key} varies the dense model, with which the cells of a sweep are compared"
        raise InputError(f"{found}; make a sweep of each")
    if key != BATCH_SIZE and any(overlap(key, block) for block in MEASURING):
        found = f"--grid {key} varies the protocol, so that the cells of a sweep cannot be compared"
        raise InputError(f"{found}; make a sweep of each")
