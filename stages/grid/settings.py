"""The block grid and the protocol of a reference -> the settings of the grid, each a protocol of its own."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.data.images import Table
from stages.grid.params import GridParams
from stages.models.params import SamplerParams
from stages.models.samplers import check_sampler, make_sampler
from stages.models.sampling import check_guidance
from stages.protocol.params import ReferenceParams
from stages.protocol.protocol import Protocol
from stages.protocol.resolve import resolve_sampler
from stages.runtime.errors import InputError

BLOCK = "grid"


@dataclass(frozen=True)
class Setting:
    """How the images of one row and column of the grid are drawn."""

    sampler: SamplerParams
    guidance: float | None
    calls: int
    """Predictions of the model for an image; guidance needs two for each of the sampler's."""

    def protocol(self, base: Protocol, scheduler: DDPMScheduler) -> Protocol:
        """Return the protocol of a reference with this setting in place of its own."""
        guidance = None if self.guidance == 1 else self.guidance  # as in the block reference
        return base.model_copy(update={**resolve_sampler(scheduler, self.sampler, BLOCK), "guidance": guidance})


def make_settings(
    grid: GridParams, reference: ReferenceParams, scheduler: DDPMScheduler, table: Table | None, model: Path | str
) -> list[Setting]:
    """Combine samplers, guidance scales and steps, and check each combination against the model.

    Args:
        grid: The block grid.
        reference: The block reference, whose sampler and guidance hold where the grid names none.
        scheduler: The noise schedule of the dense model.
        table: The conditions of a conditional model.
        model: How to call the model in messages.

    Raises:
        InputError: Steps do not fit a sampler or the model's timesteps, or guidance does not fit the model.
    """
    scales: Sequence[float | None] = (reference.guidance,) if grid.guidance is None else grid.guidance
    for scale in scales:
        check_guidance(table, scale, BLOCK, model)
    if grid.samplers is None:
        rows = [[reference.sampler.model_copy(update={"steps": steps}) for steps in grid.steps]]
    else:
        rows = [[sampler.with_steps(steps) for steps in grid.steps] for sampler in grid.samplers]
    found = []
    for sampler, scale in itertools.product(itertools.chain(*rows), scales):
        check_sampler(scheduler, sampler, BLOCK)
        calls = len(make_sampler(scheduler, sampler, BLOCK).timesteps) * (1 if scale in (None, 1) else 2)
        found.append(Setting(sampler, scale, calls))
    return found


def shrink(base: Protocol, grid: GridParams) -> Protocol:
    """Return the protocol of a reference for the images and sets of the grid, which are the first of the reference.

    Raises:
        InputError: As of `check_sizes`.
    """
    sizes = check_sizes(grid, base)
    subset = min(base.kid_subset_size, sizes["num_images"])
    return base.model_copy(update={**sizes, "kid_subset_size": subset})


def check_sizes(grid: GridParams, base: Protocol | ReferenceParams) -> dict[str, int]:
    """Check and return the grid's images of a set and its number of sets.

    Raises:
        InputError: The reference has fewer, or the images are too few for the neighbours of precision and recall.
    """
    sizes = {"num_images": grid.num_images or base.num_images, "sets": grid.sets or base.sets}
    for key, value in sizes.items():
        if value > getattr(base, key):
            found = f"grid.{key} {value} is more than the {getattr(base, key)} of the reference"
            raise InputError(f"{found}; lower it, or raise reference.{key} and run the reference stage again")
    if sizes["num_images"] <= base.neighbours:
        found = f"grid.num_images {sizes['num_images']} is not more than reference.neighbours {base.neighbours}"
        raise InputError(f"{found}; raise it")
    return sizes
