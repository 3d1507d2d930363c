"""A key that a record needs and a file lacks -> what to write there."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from stages.runtime.suggest import blocks

KINDS: dict[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
}
"""Type of a value -> what it is in YAML."""
LIMITS = {"ge": "from", "gt": "above", "le": "up to", "lt": "below", "pattern": "that matches"}
"""Constraint of a value -> the words before it."""


def describe_missing(model: type[BaseModel], key: Sequence[str], source: str | int | None = None) -> str:
    """Describe the value of a key that is missing: its kind and limits, or the keys that a block must have.

    Args:
        model: The type of the whole file.
        key: The parts of the dotted key; a part that is the number of a list's entry counts for nothing.
        source: Value of `source` in the key's block, where that chooses the block's type.
    """
    fields = list(_find_fields([model], [part for part in key if not part.isdecimal()], source))
    if not fields:
        return "add it"
    kinds = dict.fromkeys(kind for field in fields for kind in value_kinds(field.annotation, field.metadata))
    return f"add it: {' or '.join(kinds)}"


def _find_fields(
    models: Sequence[type[BaseModel]], key: Sequence[str], source: str | int | None
) -> Iterator[FieldInfo]:
    """Find the field of a key; several where a block may be of several types."""
    name, *rest = key or ("",)
    for model in models:
        field = model.model_fields.get(name)
        if field and rest:
            yield from _find_fields([*blocks(field.annotation)], rest, source)
        elif field and _takes(model, source):
            yield field


def _takes(model: type[BaseModel], source: str | int | None) -> bool:
    field = model.model_fields.get("source")
    return source is None or field is None or source in get_args(field.annotation)


def value_kinds(annotation: Any, metadata: Sequence[object] = ()) -> Iterator[str]:  # noqa: ANN401  # any type of a field
    """Yield what a type allows in the words of YAML, one for each member of a union."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from value_kinds(inner[0], [*metadata, *_unfold(inner[1:])])
    elif origin in (Union, UnionType):
        for member in sorted(inner, key=lambda it: it is NoneType):
            yield from value_kinds(member, metadata)
    elif origin is Literal:
        yield f"one of {', '.join(map(str, inner))}" if len(inner) > 1 else str(inner[0])
    elif annotation is NoneType:
        yield "null"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield _describe_block(annotation)
    elif annotation in KINDS:
        yield " ".join([KINDS[annotation], *_limits(metadata)])
    else:
        yield "a block" if origin is dict else "a list such as [a, b]"


def _describe_block(model: type[BaseModel]) -> str:
    if "source" in model.model_fields:
        return "a block with source and the keys of that source"
    needed = [name for name, field in model.model_fields.items() if field.is_required()]
    if needed:
        return f"a block with {', '.join(needed)}"
    try:
        model.model_validate({})
    except ValidationError:
        return f"a block with some of {', '.join(model.model_fields)}"
    return "a block, {} for its defaults"


def _unfold(metadata: Sequence[object]) -> Iterator[object]:
    """Replace each Field(…) by its constraints; pydantic does so for the outermost annotation alone."""
    for item in metadata:
        yield from item.metadata if isinstance(item, FieldInfo) else (item,)


def _limits(metadata: Sequence[object]) -> Iterator[str]:
    for constraint in metadata:
        for name, words in LIMITS.items():
            if (limit := getattr(constraint, name, None)) is not None:
                yield f"{words} {limit}"
