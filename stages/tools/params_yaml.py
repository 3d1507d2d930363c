"""A tree of params -> short YAML for people: a comment, and few lines."""

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
    """Write params as YAML of at most 25 lines: one for each key of a large block, everything below in one line."""
    lines = [
        f"# {comment}",
        "# Every other key has its default: espalier init --keys prune explains those of prune, and so on.",
    ]
    for key, value in tree.items():
        if isinstance(value, Mapping) and len(value) > MOST_IN_LINE:
            lines += [f"{key}:", *(f"  {name}: {_flow(inner)}" for name, inner in value.items())]
        else:
            lines.append(f"{key}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def _flow(value: object) -> str:
    """Write a value in one line of YAML; texts are quoted where YAML would read them as something else."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_flow(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, str) and PLAIN.fullmatch(value) and parse_yaml(value, "a value") == value:
        return value
    return json.dumps(value)
