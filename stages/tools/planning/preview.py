"""params.yaml -> what the stages would refuse, and the seconds, disk and memory that each would take on this device."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from stages.fetch.model import is_trusted
from stages.grid.settings import make_settings
from stages.models.autoencoder import image_shape
from stages.models.branches import find_branches
from stages.models.complexity import count_macs, count_params
from stages.models.families import sample_shape
from stages.models.samplers import make_sampler
from stages.models.trust import trusting
from stages.params import Params
from stages.protocol.extractors import Extractor, find_extractor
from stages.protocol.params import ExtractorParams
from stages.prune.compensate import find_readers
from stages.prune.surgery import cut
from stages.runtime.device import select_device
from stages.runtime.errors import InputError, UnavailableError
from stages.tools.planning.forecast import StageForecast, forecast_stages, rates_at
from stages.tools.planning.grid_workload import count_grid
from stages.tools.planning.planned_model import PlannedModel, open_model
from stages.tools.planning.preflight import FoundImages, Refusals, check_model, check_params, find_images, plan_cut
from stages.tools.planning.probe import Subject, measure_rates
from stages.tools.planning.workload import ModelSize, Work, count_work


@dataclass(frozen=True)
class Preview:
    """What a run would meet."""

    refusals: list[str]
    """What stages would refuse, one line each; empty if nothing is known to fail."""
    possible: list[str]
    """What the stage prune may refuse, with the branches, scores or milliseconds that it finds."""
    size: ModelSize | None = None
    """None where the target cannot be met, or the model cannot be opened."""
    num_images: int | None = None
    """None where the images are not known yet."""
    stages: list[StageForecast] = field(default_factory=list)
    """Empty where there is no size."""
    download: str = ""
    """What is not on this machine and will be downloaded, and what to do without a network."""


def preview(
    params: Params,
    *,
    fetched: Path | None = None,
    packed: Path | None = None,
    tflops: float | None = None,
    gpus: int = 1,
) -> Preview:
    """Check all that can be known before a stage computes, and forecast what each stage takes.

    Args:
        params: All of params.yaml.
        fetched: The model folder of the stage fetch for this source; None if it has not run.
        packed: Its folder of images; likewise.
        tflops: Sustained rate in 10¹² operations per second; None times passes on this device.
        gpus: GPUs that share the stages.

    Raises:
        UnavailableError: A server that has to be asked for the model does not answer.
    """
    startup_s = time.time() - psutil.Process().create_time()  # this process has loaded what a stage loads
    with trusting(is_trusted=is_trusted(params.fetch.model)):
        return _preview(params, fetched, packed, tflops, gpus, startup_s)


def _preview(
    params: Params, fetched: Path | None, packed: Path | None, tflops: float | None, gpus: int, startup_s: float
) -> Preview:
    device, refusals = select_device(), Refusals(params.prune)
    check_params(params, device, refusals)
    model, images, stages, size = None, None, [], None
    try:
        model = open_model(params.fetch.model, fetched, device)
        check_model(params, model, refusals)
        images = find_images(params, model, packed, refusals)
        begin = time.perf_counter()
        subject = _cut(model, params)
        cut_s = time.perf_counter() - begin
        size = measure_size(model, subject)
        works = _count_works(params, model, size, images, refusals)
        if tflops:
            rates = rates_at(tflops, params, size)
        else:
            rates = measure_rates(
                subject,
                params,
                size,
                startup_s=startup_s,
                cut_s=cut_s,
                extractor=_present_extractor(params),
                pack_s=images.pack_s if images else None,
            )
        stages = forecast_stages(params, works, rates, gpus)
    except UnavailableError:
        raise
    except InputError as error:  # what follows from the refused value cannot be known
        refusals.note(error)
    download = _describe_download(params.reference.extractor)
    num_images = images.total if images else None
    return Preview(refusals.messages, refusals.possible, size, num_images, stages, download)


def _count_works(
    params: Params, model: PlannedModel, size: ModelSize, images: FoundImages | None, refusals: Refusals
) -> dict[str, Work]:
    """Count the work of each stage, and of the block grid if there is one and the model allows its settings."""
    calls = len(make_sampler(model.scheduler, params.reference.sampler).timesteps)
    works = count_work(params, size, images.total if images else None, calls)
    if grid := params.grid:
        with refusals.collecting():  # `check_model` has noted the same
            settings = make_settings(grid, params.reference, model.scheduler, model.table, model.origin)
            works["grid"] = count_grid(params, grid, size, settings)
    return works


def _cut(model: PlannedModel, params: Params) -> Subject:
    """Cut the model to its target.

    Raises:
        InputError: The target is out of reach.
    """
    plan = plan_cut(model.unet, params)
    return Subject(model.unet, cut(model.unet, plan), plan, model.scheduler, model.autoencoder)


def measure_size(model: PlannedModel, subject: Subject) -> ModelSize:
    """Count parameters and multiply-accumulates of both models, and the numbers of their samples and images."""
    return ModelSize(
        dense_params=count_params(subject.dense),
        pruned_params=count_params(subject.pruned),
        dense_macs=count_macs(subject.dense),
        pruned_macs=count_macs(subject.pruned),
        num_readers=len(find_readers(subject.dense, subject.plan)),
        num_branches=len(find_branches(subject.dense)),
        num_removed=len(subject.plan.removed),
        num_timesteps=int(model.scheduler.config["num_train_timesteps"]),
        sample_numbers=math.prod(sample_shape(subject.dense)),
        image_bytes=math.prod(image_shape(subject.dense, model.autoencoder)),
        is_latent=model.autoencoder is not None,
    )


def _describe_download(extractor: ExtractorParams) -> str:
    """Say which weights of the extractor will be downloaded, and what to do without a network; empty if none."""
    try:
        cached = find_extractor(extractor)
    except InputError:  # refused already
        return ""
    if cached.is_file():
        return ""
    begin = f"the weights of {extractor.name} will be downloaded to {cached}"
    return f"{begin}; without a network put the file there, or use the extractor thumbnail, which needs none"


def _present_extractor(params: Params) -> Extractor | None:
    """Load the extractor if its weights are on this machine."""
    try:
        if find_extractor(params.reference.extractor).is_file():
            return Extractor(params.reference.extractor, params.reference.batch_size)
    except InputError:  # refused already, or damaged: the stage says so
        return None
    return None
