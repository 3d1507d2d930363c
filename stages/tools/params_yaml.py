"""Params -> short YAML for people: a file of few lines, or a value or some overrides in one."""

import json
import re
from collections.abc import Mapping
from typing import Any

from stages.runtime.bounded import parse_yaml

PLAIN = re.compile(r"[\w./~%][\w./~%@+-]*")
"""Texts that may stand without quotes, unless they are numbers, switches or the like."""
MOST_IN_LINE = 2
"""Keys of a block that is written in one line."""


def to_yaml(tree: Mapping[str, Any], comment: str) -> str:
    """Write params as YAML of few lines: one for each key of a large block, everything below in one line."""
    lines = [
        f"# {comment}",
        "# Every other key has its default: espalier init --keys prune explains those of prune, and so on.",
    ]
    for key, value in tree.items():
        if isinstance(value, Mapping) and len(value) > MOST_IN_LINE:
            lines += [f"{key}:", *(f"  {name}: {write_value(inner)}" for name, inner in value.items())]
        else:
            lines.append(f"{key}: {write_value(value)}")
    return "\n".join(lines) + "\n"


def write_value(value: object) -> str:
    """Write a value in one line of YAML; texts are quoted where YAML would read them as something else."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {write_value(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(write_value, value))}]"
    if isinstance(value, str) and PLAIN.fullmatch(value) and parse_yaml(value, "a value") == value:
        return value
    return json.dumps(value, ensure_ascii=False)  # YAML refuses a character that JSON writes as two


def write_overrides(overrides: Mapping[str, Any]) -> str:
    """Write overrides, each key by its last word: criterion random, macs 56%."""
    return ", ".join(f"{key.rpartition('.')[2]} {write_value(value)}" for key, value in overrides.items())
