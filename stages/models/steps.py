"""params.yaml and a model's timesteps -> whether images can be drawn, before any stage computes for hours."""

from pathlib import Path

from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.models.params import SamplerParams, SamplesParams
from stages.models.samplers import check_sampler
from stages.runtime.schema import Section, read_yaml

SAMPLES = "finetune.samples"


class _Reference(Section, extra="ignore"):
    sampler: SamplerParams | None = None


class _Finetune(Section, extra="ignore"):
    samples: SamplesParams | None = None


class _Drawing(Section, extra="ignore"):
    reference: _Reference = _Reference()
    finetune: _Finetune = _Finetune()


def check_drawing(params_path: Path, scheduler: DDPMScheduler) -> None:
    """Check the samplers of the blocks reference and finetune, where they are given, against the noise schedule.

    Nothing that a stage writes depends on this; so it reads blocks of other stages.

    Raises:
        InputError: A block is not valid, or its sampler does not fit the schedule; the key is named.
    """
    drawing = read_yaml(params_path, _Drawing)
    if drawing.reference.sampler:
        check_sampler(scheduler, drawing.reference.sampler)
    if drawing.finetune.samples:
        check_sampler(scheduler, drawing.finetune.samples.sampler, SAMPLES)
