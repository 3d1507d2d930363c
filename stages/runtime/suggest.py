"""A key that a record does not have -> the key that was probably meant."""

from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import get_args

from pydantic import BaseModel

LEAST_LIKENESS = 0.75
"""Below it, two names have too little in common: tarjet and target have 0.83, steps and stride 0.55."""
MOST = 3
"""Most keys that are suggested."""
Known = dict[str, frozenset[str]]
"""Dotted key -> the sources with which it is allowed; empty: with all."""


def known_keys(model: type[BaseModel], prefix: str = "", sources: frozenset[str] = frozenset()) -> Known:
    """List the dotted keys of a record and its blocks; of a block with a choice of sources, those of each."""
    found: Known = {}
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        found[key] = sources
        for block in blocks(field.annotation):
            for inner, own in known_keys(block, f"{key}.", _source(block) or sources).items():
                found[inner] = found.get(inner, frozenset()) | own
    return found


def suggest(key: str, known: Known, source: str | None = None) -> list[str]:
    """Return the known keys that are nearest to an unknown one, at most three, the likeliest first.

    The last part of the key decides: the same name elsewhere (prune.ratio: prune.target.ratio), else a similar one
    (prune.tarjet: prune.target). Of several, those count whose other parts are most alike.

    Args:
        key: The dotted key, such as prune.ratio; numbers of list entries count for nothing.
        known: All keys that are allowed.
        source: Value of `source` in the key's block, whose other sources have keys that do not apply.
    """
    parents, _, name = ".".join(part for part in key.split(".") if not part.isdecimal()).rpartition(".")
    scores = {}
    for candidate, sources in known.items():
        others, _, leaf = candidate.rpartition(".")
        likeness = SequenceMatcher(None, name, leaf).ratio()
        applies = others != parents or not sources or source is None or source in sources
        if likeness >= LEAST_LIKENESS and applies:
            scores[candidate] = (likeness, SequenceMatcher(None, parents, others).ratio())
    best = max(scores.values(), default=None)
    return sorted(candidate for candidate, score in scores.items() if score == best)[:MOST]


def blocks(annotation: object) -> Iterator[type[BaseModel]]:
    """Yield the records in a type, such as those of a union or of a tuple's entries."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from blocks(inner)


def _source(block: type[BaseModel]) -> frozenset[str]:
    """Return the value of `source` that chooses a block; empty for one that is no choice."""
    field = block.model_fields.get("source")
    return frozenset(map(str, get_args(field.annotation))) if field else frozenset()
