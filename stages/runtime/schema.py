"""YAML files -> frozen pydantic records that refuse unknown keys."""

import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML

from stages.runtime.bounded import MAX_YAML_BYTES, parse_yaml, read_bounded
from stages.runtime.errors import InputError
from stages.runtime.missing import describe_missing
from stages.runtime.suggest import known_keys, suggest
from stages.runtime.text import printable

Model = TypeVar("Model", bound=BaseModel)

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Commit = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]

CHOICES = (("fetch", "model"), ("fetch", "data"))
"""Blocks whose key `source` chooses their type; pydantic puts its value into the path of an error."""


class Frozen(BaseModel):
    """A frozen record; unknown keys, infinite values and NaN are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Section(Frozen):
    """A block of params.yaml."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_boolean_numbers(cls, values: object) -> object:
        """Refuse true and false for fields that are not switches; pydantic would take them for 1 and 0."""
        for name, value in values.items() if isinstance(values, dict) else ():
            if name not in cls.model_fields or _is_switch(cls.model_fields[name].annotation):
                continue
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, bool):
                    raise ValueError(f"{name} is {str(value).lower()}, which is allowed for switches only")  # noqa: TRY004  # pydantic's
        return values


class _Seed(Section, extra="ignore"):
    seed: int = Field(ge=0)


def read_yaml(path: Path, model: type[Model]) -> Model:
    """Read a YAML file as a record.

    Raises:
        InputError: The file is missing or is not valid YAML, or a value is not allowed; every wrong value is named.
    """
    return validate_tree(read_tree(path, YAML(typ="safe")), model, str(path))


def load_block(path: Path, name: str, model: type[Model]) -> Model:
    """Read one block of a params file, such as prune for the stage prune; the other blocks are not checked.

    Raises:
        InputError: The file is missing or is not valid YAML, the block is missing, or a value is not allowed; every
            wrong value is named.
    """
    block = create_model("Block", __config__=ConfigDict(extra="ignore"), **{name: (model, ...)})  # type: ignore[call-overload]
    record: Model = getattr(read_yaml(path, block), name)
    return record


def load_seed(path: Path) -> int:
    """Read the seed of a params file, the root of every random draw.

    Raises:
        InputError: The file is missing or is not valid YAML, or its seed is missing or negative.
    """
    return read_yaml(path, _Seed).seed


def read_tree(path: Path, yaml: YAML) -> Any:  # noqa: ANN401  # YAML may hold anything
    """Read a YAML file as plain mappings, lists and scalars.

    Raises:
        InputError: The file is missing or is not valid YAML, or passes a limit of `parse_yaml`.
    """
    try:
        text = read_bounded(path, MAX_YAML_BYTES).decode()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; correct the path to it") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    return parse_yaml(text, str(path), yaml)


def validate_tree(tree: object, model: type[Model], name: str) -> Model:
    """Convert the content of a YAML file to a record.

    Args:
        tree: The content.
        model: The type of the record.
        name: Name of the file in error messages.

    Raises:
        InputError: A value is not allowed; every wrong value is named.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        errors = sorted(
            error.errors(), key=lambda it: it["type"] != "extra_forbidden"
        )  # a misspelt key is missing, too
        told = [printable(_explain(each, model)) for each in errors if not _follows(each, errors)]
        raise InputError(f"{name}: {'; '.join(told)}") from None


def _follows(error: ErrorDetails, errors: list[ErrorDetails]) -> bool:
    """Whether an error is one only because of another: a list too short without its wrong items, or a default."""
    if error["type"] == "default_factory_not_called":
        return True
    place = error["loc"]
    return error["type"] == "too_short" and any(it["loc"][: len(place)] == place != it["loc"] for it in errors)


def _explain(error: ErrorDetails, model: type[BaseModel]) -> str:
    parts = list(error["loc"])
    source = parts.pop(2) if tuple(parts[:2]) in CHOICES and len(parts) > 2 else None  # noqa: PLR2004
    key = ".".join(map(str, parts)) or "the file"
    if error["type"] == "extra_forbidden":
        return _explain_unknown(key, model, source)
    if error["type"] == "missing":
        return f"{key}: field required; {describe_missing(model, key.split('.'), source)}"
    message = _plain_message(error)
    if error["type"] == "union_tag_not_found":
        message += f"; allowed: {', '.join(sorted(known_keys(model)[f'{key}.source']))}"
    if error["type"] in BLOCKS and (inner := [it for it in known_keys(model) if it.rpartition(".")[0] == key]):
        message += f"; it has {', '.join(it.rpartition('.')[2] for it in inner)}"
    if isinstance(error["input"], dict):  # a whole block is too long for the message
        return f"{key}: {message[0].lower()}{message[1:]}"
    return f"{key} is {reprlib.repr(error['input'])}: {message[0].lower()}{message[1:]}"


def _explain_unknown(key: str, model: type[BaseModel], source: str | int | None) -> str:
    known = known_keys(model)
    if key in known:
        return f"{key} is not a known key with source {source}; remove it, or choose another source"
    near = suggest(key, known, str(source))
    advice = f"did you mean {' or '.join(near)}?" if near else "remove it or correct its spelling"
    return f"{key} is not a known key; {advice}"


BLOCKS = ("model_type", "model_attributes_type", "dict_type", "mapping_type")
_BLOCK, _LIST = "write a block, with a key and a value in each line", "write a list such as [a, b]"
PLAIN = {
    **dict.fromkeys(BLOCKS, _BLOCK),
    **dict.fromkeys(("tuple_type", "list_type"), _LIST),
}
"""Pydantic's types of errors -> what they mean in YAML."""


def _plain_message(error: ErrorDetails) -> str:
    """Return pydantic's message, or what it says in the words of YAML where it speaks of Python."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in PLAIN:
        return PLAIN[kind]
    if kind == "too_short":
        return f"write a list of at least {context['min_length']}"
    if kind == "union_tag_not_found":
        return f"the key {context['discriminator'].strip(chr(39))} is missing"
    if kind == "union_tag_invalid":
        given = f"{context['discriminator'].strip(chr(39))} is {context['tag']!r}"
        return f"{given}; allowed: {context['expected_tags'].replace(chr(39), '')}"
    return error["msg"].removeprefix("Value error, ")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten nested mappings to dotted keys: {"a": {"b": 1}} -> ("a.b", 1)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_switch(annotation: object) -> bool:
    return annotation in (bool, bool | None)
