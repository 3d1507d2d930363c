"""Files from outside -> bytes, JSON and YAML of bounded size and depth; docs/security.md lists the limits."""

import json
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, Event, NodeEvent

from stages.runtime.errors import InputError, first_line

MIB = 1024 * 1024
MAX_JSON_BYTES = 64 * MIB
"""The plan of the largest UNets, with every kept channel on its own line, has some 16 MiB."""
MAX_YAML_BYTES = MIB // 4
MAX_DEPTH = 64
"""Most levels of lists and blocks in each other."""
MAX_YAML_VALUES = 50_000
"""Most values of a YAML text, each alias counted as all that it stands for."""


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Read a regular file.

    Raises:
        OSError: It is missing or cannot be read.
        InputError: It is a pipe, device or socket, which might never end, or is larger than `max_bytes`.
    """
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise InputError(f"{path} is larger than {max_bytes // 1024} KiB, the limit for such a file; use another file")
    return content


def check_regular(path: Path) -> None:
    """Refuse a pipe, device or socket in place of a file; the reader reports what is missing or a folder.

    Raises:
        InputError: It is one.
    """
    with suppress(OSError, ValueError):
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise InputError(f"{path} is a pipe, device or socket; give a regular file")


def parse_json(content: bytes) -> Any:  # noqa: ANN401  # JSON may hold anything
    """Parse JSON in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: It is not valid JSON, or has more than 64 levels.
    """
    text = content.decode("utf-8-sig")
    try:
        tree = json.loads(text)
    except RecursionError:
        raise _too_deep() from None
    _check_depth(tree)
    if re.search(r"\\u[dD][89a-fA-F]", text):
        json.dumps(tree, ensure_ascii=False).encode()  # half of a pair, which no file and no terminal takes
    return tree


def _check_depth(tree: object) -> None:
    level, depth = [tree], 1
    while level := [child for node in level if isinstance(node, dict | list) for child in _children(node)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()


def _children(node: dict[str, Any] | list[Any]) -> list[Any]:
    values = node.values() if isinstance(node, dict) else node
    return [value for value in values if isinstance(value, dict | list)]


def _too_deep() -> ValueError:
    return ValueError(f"it has more than {MAX_DEPTH} levels, the limit")


def parse_yaml(text: str, name: str, yaml: YAML | None = None) -> Any:  # noqa: ANN401  # YAML may hold anything
    """Parse YAML into plain mappings, lists and scalars.

    Args:
        text: The YAML.
        name: Its file or option, for messages.
        yaml: The loader; None takes the safe one.

    Raises:
        InputError: It is not valid YAML, is larger than 256 KiB, has more than 64 levels, or more than 50,000 values
            with all aliases replaced.
    """
    if len(text) > MAX_YAML_BYTES:
        raise InputError(f"{name} is larger than {MAX_YAML_BYTES // 1024} KiB, the limit for YAML; shorten it")
    try:
        _check_events(YAML(typ="safe").parse(text))
        return (yaml or YAML(typ="safe")).load(text)
    except DuplicateKeyError as error:
        key, line = re.search(r'duplicate key "(.*?)"', error.problem), error.problem_mark.line + 1
        found = f"{name} has the key {key[1] if key else ''} a second time in line {line}"
        raise InputError(f"{found}; remove one of the two") from None
    except YAMLError as error:
        raise InputError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
    except Exception as error:  # noqa: BLE001  # tags such as !!bool and !!timestamp raise anything on other text
        raise InputError(f"{name} is not valid YAML: {first_line(error)}") from None


def _alias_size(alias: AliasEvent, sizes: Mapping[str | None, int]) -> int:
    if alias.anchor not in sizes:
        raise ValueError(f"the alias *{alias.anchor} is part of what it stands for, or of nothing")
    return sizes[alias.anchor]


def _check_events(events: Iterator[Event]) -> None:
    """Bound depth and number of values before anything is built, since aliases and merges multiply what is built."""
    sizes: dict[str | None, int] = {}
    opened: list[tuple[str | None, int]] = []
    total = 0
    for event in events:
        if isinstance(event, AliasEvent):
            total += _alias_size(event, sizes)
        elif isinstance(event, NodeEvent):
            total += 1
            if isinstance(event, CollectionStartEvent):
                opened.append((event.anchor, total))
            else:
                sizes[event.anchor] = 1
        elif isinstance(event, CollectionEndEvent):
            anchor, begin = opened.pop()
            sizes[anchor] = total - begin + 1
        if len(opened) > MAX_DEPTH:
            raise _too_deep()
        if total > MAX_YAML_VALUES:
            raise ValueError(f"it has more than {MAX_YAML_VALUES} values, the limit, with all aliases replaced")
