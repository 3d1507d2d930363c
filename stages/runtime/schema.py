"""What every checked record has in common: it cannot be changed, and what it does not know it refuses."""

import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.runtime.errors import InputError, first_line

Model = TypeVar("Model", bound=BaseModel)

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Commit = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]


class Frozen(BaseModel):
    """A checked record: it cannot be changed, and a key it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Section(Frozen):
    """A block of params.yaml."""

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, values: object) -> object:
        for name, value in values.items() if isinstance(values, dict) else ():
            if (
                isinstance(value, bool)
                and name in cls.model_fields
                and not _is_switch(cls.model_fields[name].annotation)
            ):
                raise ValueError(f"{name} is {str(value).lower()}, which is allowed for switches only")
        return values


class _Seed(Section, extra="ignore"):
    seed: int = Field(ge=0)


def read_yaml(path: Path, model: type[Model]) -> Model:
    """Read a YAML file as a checked record.

    Raises:
        InputError: The file is missing, is no YAML, or a value is not allowed; every wrong value is named.
    """
    return check(read_tree(path, YAML(typ="safe")), model, str(path))


def load_block(path: Path, name: str, model: type[Model]) -> Model:
    """Read one block of a params file, such as the block prune for the stage prune; other blocks are not looked at.

    Raises:
        InputError: The file is missing or no YAML, it has no such block, or a value is not allowed; every wrong value
            is named.
    """
    block = create_model("Block", __config__=ConfigDict(extra="ignore"), **{name: (model, ...)})  # type: ignore[call-overload]
    found: Model = getattr(read_yaml(path, block), name)
    return found


def load_seed(path: Path) -> int:
    """Read the seed of a params file, the root of every random draw.

    Raises:
        InputError: The file is missing or no YAML, or its seed is no number from 0.
    """
    return read_yaml(path, _Seed).seed


def read_tree(path: Path, yaml: YAML) -> Any:  # noqa: ANN401  # YAML may hold anything
    """Read a YAML file.

    Raises:
        InputError: The file is missing or no YAML.
    """
    try:
        return yaml.load(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; correct the path to it") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except (KeyError, RecursionError, ValueError) as error:  # what YAML itself cannot make or nest
        raise InputError(f"{path} is not valid YAML: {first_line(error)}") from None


def check(tree: object, model: type[Model], name: str) -> Model:
    """Make a checked record of what a YAML file holds.

    Raises:
        InputError: A value is not allowed; every wrong value is named.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{name}: {'; '.join(_explain(e) for e in error.errors())}") from None


def _explain(error: ErrorDetails) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "the file"
    if error["type"] == "extra_forbidden":
        return f"{key} is not a known key; remove it or correct its spelling"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], dict):  # a whole block, which would drown the message
        return f"{key}: {message[0].lower()}{message[1:]}"
    return f"{key} is {reprlib.repr(error['input'])}: {message[0].lower()}{message[1:]}"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": {"b": 1}} -> ("a.b", 1)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_switch(annotation: object) -> bool:
    return annotation in (bool, bool | None)
