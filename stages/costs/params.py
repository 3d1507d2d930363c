"""The block costs of params.yaml."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.runtime.schema import Section


class CostsParams(Section):
    """Which forward passes are timed."""

    batches: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 16, 128), min_length=1)
    """Images a pass; the first is the one whose latency stands in the results."""
    precisions: tuple[Literal["float32", "bfloat16"], ...] = Field(("float32",), min_length=1)
    compiled: bool = False
    """Time torch.compile too; compiling takes up to minutes a row."""
    repeats: int = Field(50, ge=3, le=100_000)
    """Timed passes a row, at most."""
    seconds: float = Field(10, gt=0)
    """Time for a row. Three passes are taken at least; where they would not fit, by the row before, it is left out."""

    @model_validator(mode="after")
    def _are_settings(self) -> "CostsParams":
        for name in ("batches", "precisions"):
            chosen = getattr(self, name)
            if len(set(chosen)) < len(chosen):
                raise ValueError(f"{name} names a setting twice")
        return self
