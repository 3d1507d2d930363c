"""The block costs of params.yaml."""

import itertools
from typing import Annotated

from pydantic import Field, model_validator

from stages.models.params import PrecisionName
from stages.runtime.schema import Section

PASSES = 6
"""Smallest number of timed passes: no interval of a median of fewer values reaches 95 %."""


class CostsParams(Section):
    """Which forward passes are timed."""

    batches: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 16, 128), min_length=1)
    """Batch sizes that are timed; the results table shows the first."""
    precisions: tuple[PrecisionName, ...] = Field(("float32",), min_length=1)
    """Precisions that are timed; the results table shows the first. A device without tf32 leaves its rows out."""
    deterministic: bool = False
    """Whether passes are timed with deterministic kernels; false times those that PyTorch chooses for speed, as it does
    for whoever draws with the released model."""
    compiled: bool = False
    """Whether to time torch.compile as well, which takes up to minutes for each row."""
    repeats: int = Field(50, ge=PASSES, le=100_000)
    """Largest number of timed passes for each row."""
    seconds: float = Field(10, gt=0)
    """Seconds for the passes in turn of all models in one setting; with variants, times the number of what is timed. A
    setting in which six passes would not fit, by the time of the setting before, is left out."""

    @property
    def settings(self) -> list[tuple[str, str, int]]:
        """(precision, mode, batch) of each setting, in the order in which they are timed."""
        modes = ["eager", "compiled"] if self.compiled else ["eager"]
        return list(itertools.product(self.precisions, modes, self.batches))

    @model_validator(mode="after")
    def _are_settings(self) -> "CostsParams":
        for name in ("batches", "precisions"):
            chosen = getattr(self, name)
            if len(set(chosen)) < len(chosen):
                raise ValueError(f"{name} names a setting twice")
        return self
