"""The block grid of params.yaml, which the command `espalier grid` reads and no stage of dvc.yaml."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from stages.models.params import SamplerParams, SchedulerName
from stages.runtime.schema import Section


class GridSampler(Section):
    """A sampler of the grid; its numbers of steps are in `steps`."""

    scheduler: SchedulerName = "DDIM"
    """As of reference.sampler."""
    spacing: Literal["leading", "linspace", "trailing", "quadratic"] = "leading"
    """As of reference.sampler."""
    eta: float = Field(0.0, ge=0, le=1)
    """As of reference.sampler."""
    clip: bool | None = None
    """As of reference.sampler."""

    @model_validator(mode="after")
    def _scheduler_supports_options(self) -> "GridSampler":
        try:
            self.with_steps(1)
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return self

    def with_steps(self, steps: int) -> SamplerParams:
        """Return the sampler with a number of steps."""
        return SamplerParams(**self.model_dump(), steps=steps)


class GridParams(Section):
    """Which steps, samplers and guidance scales dense and pruned models are compared at; all are combined."""

    steps: tuple[Annotated[int, Field(ge=1)], ...] = (5, 10, 20, 50)
    """Numbers of sampling steps."""
    samplers: tuple[GridSampler, ...] | None = None
    """Samplers; null takes that of the block reference."""
    guidance: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """Scales of classifier-free guidance of a conditional model, 1 without it; null takes that of the block
    reference."""
    models: tuple[Literal["pruned", "finetuned"], ...] = ("finetuned",)
    """Models beside the dense one."""
    num_images: int | None = Field(None, ge=2)
    """Images of a set, at most reference.num_images; null takes as many."""
    sets: int | None = Field(None, ge=1)
    """Number of sets, at most reference.sets; null takes as many. Intervals need two or more."""

    @model_validator(mode="after")
    def _names_each_once(self) -> "GridParams":
        for name in ("steps", "samplers", "guidance", "models"):
            chosen: Sequence[object] | None = getattr(self, name)
            if chosen is None:
                continue
            if not chosen:  # min_length would also call a list empty whose values are wrong
                raise ValueError(f"{name} is empty; name at least one value")
            if any(value in chosen[:place] for place, value in enumerate(chosen)):
                raise ValueError(f"{name} names a value twice")
        return self


class OptionalGrid(Section, extra="ignore"):
    """A params file in which the block may be missing."""

    grid: GridParams | None = None
