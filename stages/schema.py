"""What every checked record has in common: it cannot be changed, and what it does not know it refuses."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

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


def _is_switch(annotation: object) -> bool:
    return annotation in (bool, bool | None)
