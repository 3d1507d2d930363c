"""A grid over params.yaml -> the cells of a sweep, each allowed."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flows.workspaces.overrides import Overrides, check_apart, write
from flows.workspaces.repository import ParamsSource, Repository
from stages.runtime.errors import InputError

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
        InputError: The grid has no cells, or a value is not allowed.
    """
    cells = [PlannedCell(write(cell), {**overrides, **cell}) for cell in combine(grid)]
    repository.render(source, [cell.overrides for cell in cells])
    return cells


def check_disjoint(grid: Grid, overrides: Overrides) -> None:
    """Check that what is varied and what is fixed are different, and so are the keys that are varied.

    Raises:
        InputError: Two keys overlap.
    """
    check_apart(overrides, grid, "--set", "--grid")
    for one, other in itertools.combinations(grid, 2):
        check_apart([other], [one], "--grid", "--grid")
