"""KEY=VALUE from a command line or a deployment -> checked changes of params.yaml."""

import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.params import Params
from stages.runtime.errors import InputError, first_line
from stages.runtime.schema import read_tree, validate_tree

Overrides = Mapping[str, Any]
"""Dotted keys of params.yaml -> values: {"prune.target.macs": "56%"}."""


@dataclass(frozen=True)
class PlannedCell:
    """One compression of a series."""

    label: str
    """For people."""
    overrides: Overrides
    about: Mapping[str, Any] = field(default_factory=dict)
    """What its note says beside that."""


def parse_overrides(
    texts: Iterable[str], option: str = "--set", example: str = "prune.target.macs=56%"
) -> dict[str, Any]:
    """Read KEY=VALUE, the value as YAML does.

    Raises:
        InputError: A text is not of that form, or a key stands twice.
    """
    return dict(_pairs(texts, option, example))


def parse_grid(texts: Iterable[str]) -> dict[str, list[Any]]:
    """Read KEY=VALUE,VALUE,… or KEY=[VALUE, …].

    Raises:
        InputError: A text is not of that form, or a key stands twice.
    """
    return dict(_pairs(texts, "--grid", "importance.criterion=random,magnitude", as_list=True))


def _pairs(texts: Iterable[str], option: str, example: str, *, as_list: bool = False) -> Iterator[tuple[str, Any]]:
    seen: set[str] = set()
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise InputError(f"{option} {text} is not KEY=VALUE; write for example {option} {example}")
        if key in seen:
            raise InputError(f"{option} {key} stands twice; give it once")
        seen.add(key)
        if as_list and not value.lstrip().startswith("["):
            value = f"[{value}]"
        try:
            yield key, YAML(typ="safe").load(value)
        except (YAMLError, ValueError) as error:
            raise InputError(f"{option} {key}: {value!r} is not valid YAML: {first_line(error)}") from None


def check_apart(grid: Iterable[str], overrides: Iterable[str]) -> None:
    """Refuse keys that a grid and overrides both set.

    Raises:
        InputError: There is one.
    """
    both = sorted(set(grid) & set(overrides))
    if both:
        raise InputError(f"{', '.join(both)} stands in --grid and in --set; give it once")


def plan_cells(grid: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Combine every value of every key of a grid with every other: the overrides of each cell, in order, each once.

    Raises:
        InputError: The grid has no cells.
    """
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"the grid has no cells, since {key} has no list of values; give it one or more")
    if not grid:
        raise InputError("the grid has no cells; give at least one --grid KEY=VALUE,VALUE")
    unlike = ({json.dumps(value, default=str): value for value in values}.values() for values in grid.values())
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*unlike)]


def apply(overrides: Overrides, params_path: Path) -> bytes:
    """Give a params file as it is with the overrides, its comments kept.

    A block of which one key rules out the others, such as prune.target or fetch.model, is given up for what the
    overrides say of it where both together are not allowed.

    Raises:
        InputError: The result is not allowed; the key is named.
    """
    tree = read_tree(params_path, _round_trip())
    emptied: list[str] = []
    for block in sorted({key.rpartition(".")[0] for key in overrides} - {""}):
        if _count_errors(_merge(tree, overrides, [*emptied, block])) < _count_errors(_merge(tree, overrides, emptied)):
            emptied.append(block)
    merged = _merge(tree, overrides, emptied)
    if _count_errors(merged):
        given = "".join(f" {key}={value}" for key, value in overrides.items())
        # What was not given up is told of as it stood, since that is what the user knows.
        validate_tree(_plain(_merge(tree, overrides)), Params, f"{params_path.name}{' with' if given else ''}{given}")
    return _write(merged)


def write(overrides: Overrides) -> str:
    """Write overrides for people: criterion random, macs 56%."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in overrides.items())


def _merge(tree: Any, overrides: Overrides, emptied: Iterable[str] = ()) -> Any:  # noqa: ANN401  # YAML may hold anything
    tree = deepcopy(tree)
    for key, value in [*((block, {}) for block in emptied), *overrides.items()]:
        *path, last = key.split(".")
        block = tree
        for part in path:
            if not isinstance(block, dict):
                break
            if not isinstance(block.get(part), dict):
                block[part] = {}
            block = block[part]
        block[last] = deepcopy(value)
    return tree


def _count_errors(tree: object) -> int:
    try:
        Params.model_validate(_plain(tree))
    except ValidationError as error:
        return error.error_count()
    return 0


def _write(tree: object) -> bytes:
    target = io.BytesIO()
    _round_trip().dump(tree, target)
    return target.getvalue()


def _round_trip() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 120
    return yaml


def _plain(tree: object) -> Any:  # noqa: ANN401
    """Drop what a round trip of YAML remembers of form."""
    return YAML(typ="safe").load(_write(tree).decode())
