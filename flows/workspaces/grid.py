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
        InputError: The grid has no cells or varies the dense model, or a value is not allowed.
    """
    combined = combine(grid)
    _check_model(grid)
    cells = [PlannedCell(write(cell), {**overrides, **cell}) for cell in combined]
    repository.render(source, [cell.overrides for cell in cells])
    return cells


def _check_model(grid: Grid) -> None:
    """Check that all cells have one dense model, against which they are measured.

    Raises:
        InputError: The model is varied.
    """
    if varied := [key for key, values in grid.items() if overlap(key, MODEL) and len(values) > 1]:
        found = f"--grid {varied[0]} varies the dense model, with which the cells of a sweep are compared"
        raise InputError(f"{found}; make a sweep of each")


def check_sweep_keys(grid: Grid, overrides: Overrides) -> None:
    """Check that every key of a sweep has an effect: what is varied is set after what is fixed.

    Raises:
        InputError: A varied key replaces a fixed one, or a varied one before it.
    """
    check_replaced(grid, overrides, "--grid", "--set")
    check_order(grid, "--grid")
