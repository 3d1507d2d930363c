"""The types of params.yaml -> a list of its keys for people: what each may be, its default and its meaning."""

import ast
import inspect
import json
from collections.abc import Iterator
from functools import cache
from textwrap import dedent, wrap
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from stages.params import Params
from stages.runtime.errors import InputError
from stages.runtime.missing import value_kinds
from stages.runtime.suggest import blocks, known_keys, suggest

WIDTH = 110
"""Characters in a line of a meaning, without its indent."""
INDENT = "    "


def list_keys(key: str) -> str:
    """Describe a key of params.yaml and all keys below it.

    Args:
        key: Dotted, such as prune or prune.target.

    Raises:
        InputError: There is no such key.
    """
    found = [text for name, text in _describe(Params) if name == key or name.startswith(f"{key}.")]
    if not found:
        near = suggest(key, known_keys(Params)) or list(Params.model_fields)
        raise InputError(f"{key} is no key of params.yaml; choose {', '.join(near)}")
    return "\n".join(found)


def _describe(model: type[BaseModel], prefix: str = "", note: str = "") -> Iterator[tuple[str, str]]:
    """Yield each key with its description, those of a block below it."""
    meanings = read_meanings(model)
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        lines = wrap(meanings.get(name, ""), WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)
        yield key, "\n".join([f"{key}{note}: {_values(field)}", *lines])
        inner = list(blocks(field.annotation))
        for block in inner:
            yield from _describe(block, f"{key}.", f" ({_name(block)})" if len(inner) > 1 else note)


def _values(field: FieldInfo) -> str:
    """Say what a field may be, and its default."""
    kinds = " or ".join(dict.fromkeys(value_kinds(field.annotation, field.metadata)))
    if field.is_required():
        return f"{kinds}; required"
    if field.default_factory is not None:
        return f"{kinds}; the default follows from other keys"
    if isinstance(field.default, BaseModel):
        return kinds
    return f"{kinds}; {json.dumps(to_jsonable_python(field.default))} by default"


def _name(block: type[BaseModel]) -> str:
    source = block.model_fields.get("source")
    return f"source {', '.join(map(str, get_args(source.annotation)))}" if source else block.__name__


@cache
def read_meanings(model: type[BaseModel]) -> dict[str, str]:
    """Read the text below each field of a record and of what it inherits from; field -> text in one line."""
    found = {}
    for base in reversed(model.__mro__):
        if issubclass(base, BaseModel) and base is not BaseModel:
            (body,) = ast.parse(dedent(inspect.getsource(base))).body
            assert isinstance(body, ast.ClassDef)
            for field, text in zip(body.body, body.body[1:], strict=False):
                match field, text:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(meaning))):
                        found[name] = " ".join(meaning.split())
    return found
