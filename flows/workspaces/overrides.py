"""KEY=VALUE from a command line or a deployment -> checked changes of params.yaml."""

import io
import itertools
import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.params import Params
from stages.runtime.bounded import parse_yaml
from stages.runtime.errors import InputError
from stages.runtime.schema import flatten, read_tree, validate_tree
from stages.runtime.text import printable
from stages.tools.params_yaml import write_overrides

Overrides = Mapping[str, Any]
"""Dotted keys of params.yaml -> values: {"prune.target.macs": "56%"}."""
MAX_LEVELS = 8
"""Most dots in a key."""


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Read KEY=VALUE; the value is YAML.

    Raises:
        InputError: A text has another form, or a key occurs twice.
    """
    return _none_replaced("--set", dict(parse_pairs(texts, "--set", "prune.target.macs=56%")))


def parse_limits(texts: Iterable[str]) -> dict[str, float]:
    """Read STAGE=MINUTES.

    Raises:
        InputError: A text has another form, or a key occurs twice.
    """
    return dict(parse_pairs(texts, "--limit", "finetune=90"))


def parse_grid(texts: Iterable[str]) -> dict[str, list[Any]]:
    """Read KEY=VALUE,VALUE,… or KEY=[VALUE, …].

    Raises:
        InputError: A text has another form, or a key occurs twice.
    """
    pairs = parse_pairs(texts, "--grid", "importance.criterion=random,magnitude", as_list=True)
    return _none_replaced("--grid", dict(pairs))


def parse_pairs(texts: Iterable[str], option: str, example: str, *, as_list: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield each key and value of texts KEY=VALUE.

    Raises:
        InputError: A text has another form, or a key occurs twice; the message names the option.
    """
    seen: set[str] = set()
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise InputError(f"{option} {text} is not KEY=VALUE; write for example {option} {example}")
        if key in seen:
            raise InputError(f"{option} {key} is given twice; give it once")
        seen.add(key)
        if as_list and not value.lstrip().startswith("["):
            value = f"[{value}]"
        tree = parse_yaml(value, f"{option} {key}")
        try:
            json.dumps(tree)
        except (TypeError, ValueError):  # such as a date, a set or bytes
            raise InputError(f"{option} {key} is not a number, text, switch, list or block of these") from None
        yield key, tree


def overlap(one: str, other: str) -> bool:
    """Whether two dotted keys are equal, or one is a block that holds the other."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def check_replaced(keys: Iterable[str], earlier: Iterable[str], option: str, earlier_option: str) -> None:
    """Check that no key, which is set later, replaces an earlier one: that would have no effect.

    Raises:
        InputError: A key equals an earlier one, or is a block that holds it.
    """
    for key, other in itertools.product(keys, earlier):
        if f"{other}.".startswith(f"{key}."):
            found = f"{option} {key} would replace {earlier_option} {other}"
            raise InputError(f"{found}; leave one of them out, or name keys within the block after it")


def check_order(keys: Iterable[str], option: str) -> None:
    """Check that none of some keys, set in this order, replaces one before it.

    Raises:
        InputError: One does.
    """
    for one, other in itertools.combinations(keys, 2):
        check_replaced([other], [one], option, option)


def _none_replaced(option: str, given: dict[str, Any]) -> dict[str, Any]:
    check_order(given, option)
    return given


def apply(overrides: Overrides, params_path: Path) -> bytes:
    """Return a params file with the overrides, its comments kept.

    A block whose keys exclude each other is replaced by what the overrides set in it: prune.target by any of its keys,
    fetch.model and fetch.data by another source.

    Raises:
        InputError: The result is not allowed; the message names the key.
    """
    tree = read_tree(params_path, _round_trip())
    if isinstance(tree, dict):
        for block in list(_replaced_blocks(tree, overrides)):
            _set(tree, block, {})
        for key, value in overrides.items():
            _set(tree, key, deepcopy(value))
    given = "".join(f" {key}={value}" for key, value in overrides.items())
    validate_tree(_plain(tree), Params, f"{params_path.name}{' with' if given else ''}{given}")
    return _write(tree)


def _replaced_blocks(tree: Mapping[str, Any], overrides: Overrides) -> Iterator[str]:
    if any(key.startswith("prune.target.") for key in overrides):
        yield "prune.target"
    for block in ("fetch.model", "fetch.data"):
        key = f"{block}.source"
        if key in overrides and overrides[key] != dict(flatten(tree)).get(key):
            yield block


def write(overrides: Overrides) -> str:
    """Describe overrides in a few words: criterion random, macs 56%."""
    return printable(write_overrides(overrides))


def _set(tree: dict[str, Any], key: str, value: object) -> None:
    """Set a dotted key; a part of it that is no block becomes one, which the check afterwards judges.

    Raises:
        InputError: The key has too many parts.
    """
    *path, last = key.split(".")
    if len(path) > MAX_LEVELS:
        raise InputError(f"{reprlib.repr(key)} is not a key of params.yaml; keys have at most {MAX_LEVELS + 1} parts")
    for part in path:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[last] = value


def _write(tree: object) -> bytes:
    target = io.BytesIO()
    _round_trip().dump(tree, target)
    return target.getvalue()


def _round_trip() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 120
    return yaml


def _plain(tree: object) -> Any:  # noqa: ANN401
    """Convert to plain types, without what a round trip of YAML keeps of comments and form."""
    return parse_yaml(_write(tree).decode(), "params.yaml")
