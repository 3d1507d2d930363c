"""Input folders -> a trainer; a finished training -> the model folder and the report."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from stages.finetune.checkpoint import Checkpoints
from stages.finetune.distillation import WITHOUT_TEACHER, Channels, check_features, read_teacher
from stages.finetune.engine import Engine
from stages.finetune.interrupt import StoppedError
from stages.finetune.params import FinetuneParams
from stages.finetune.report import write_report
from stages.finetune.trainer import CurveCallback, Trainer
from stages.models import pipeline
from stages.models.autoencoder import read_autoencoder
from stages.models.checks import read_fitting_images
from stages.models.families import Denoiser
from stages.models.layout import SNAPSHOTS
from stages.models.pruned_unet import Layers
from stages.models.samplers import check_sampler
from stages.models.sampling import SamplingContext
from stages.models.steps import SAMPLES
from stages.runtime.device import device_name, keep_freed_memory
from stages.runtime.errors import InputError
from stages.runtime.schema import flatten
from stages.runtime.seeds import derive_seed
from stages.storage.files import writing
from stages.storage.provenance import fingerprint, write_provenance, write_run_record
from stages.storage.s3 import open_store
from stages.tracking.live import LiveRun


def finetune_folders(
    model: Path,
    teacher: Path | None,
    data: Path,
    checkpoints: Path,
    out: Path,
    report: Path,
    *,
    params: FinetuneParams,
    seed: int,
    device: torch.device,
) -> None:
    """Train the model of a folder, from its newest checkpoint if there is one, and write the result and its report.

    Raises:
        InputError: An input does not fit the others, the loss is not finite, or the gate is out of reach.
        StoppedError: A signal stopped the training; a checkpoint is saved.
    """
    trainer = prepare(model, teacher, data, params, seed, device)
    engine, inputs = trainer.engine, [path for path in (model, data, teacher) if path]
    run = engine.share_sha256(
        lambda: fingerprint("finetune", inputs, seed=seed, finetune=params.of_weights(), processes=engine.num_processes)
    )
    recover(trainer, checkpoints, run, model, out, report)


def prepare(
    model: Path, teacher: Path | None, data: Path, params: FinetuneParams, seed: int, device: torch.device
) -> Trainer:
    """Load what a recovery needs, and check that it belongs together.

    Raises:
        InputError: Something is missing or damaged, or does not fit the rest.
    """
    engine = Engine(params.engine, device)
    if device.type == "cpu":
        keep_freed_memory()
    unet, scheduler = pipeline.read_unet(model, engine.device), pipeline.read_scheduler(model)
    if params.samples:
        check_sampler(scheduler, params.samples.sampler, SAMPLES)
    images = read_fitting_images(data, unet)
    taught = _read_teacher(teacher, model, params, engine.device)
    if params.init == "scratch":
        unet = with_fresh_weights(unet, derive_seed(seed, "scratch"))
    table = images.conditions.table if images.conditions else None
    context = SamplingContext(read_autoencoder(model, engine.device) if params.samples else None, table)
    return Trainer(unet, scheduler, images, params, seed, taught, engine, context)


def _read_teacher(
    teacher: Path | None, model: Path, params: FinetuneParams, device: torch.device
) -> tuple[Denoiser, Channels] | None:
    if not params.loss.needs_teacher:
        return None
    if teacher is None:
        found = "finetune.loss distils from the dense model; give it with --teacher"
        raise InputError(f"{found}, or {WITHOUT_TEACHER}")
    dense, channels = read_teacher(teacher, model, device)
    check_features(dense, params.loss.feature)
    return dense, channels


def with_fresh_weights(unet: Denoiser, seed: int) -> Denoiser:
    """Copy a model and initialise the weights of the copy again, by the default of each layer."""
    copied = copy.deepcopy(unet).cpu()
    others = [
        name
        for name, it in copied.named_modules()
        if not isinstance(it, Layers) and any(True for _ in it.parameters(recurse=False))
    ]
    if others:
        found = f"finetune.init is scratch, and {others[0] or 'the model'} has weights of no known kind of layer"
        raise InputError(f"{found}; set it to pruned")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in copied.modules():
            if isinstance(module, Layers):
                module.reset_parameters()
    return copied.to(unet.device)  # type: ignore[arg-type,no-any-return]  # diffusers' wrapper is untyped


@contextmanager
def live_logging(run: str, params: FinetuneParams, engine: Engine) -> Iterator[CurveCallback | None]:
    """Log a training to MLflow while it runs, from the main process only; yield the callback that logs a row."""
    if not engine.is_main:
        yield None
        return
    live = LiveRun(run, dict(flatten(params.model_dump(mode="json"))))
    status = "FAILED"
    try:
        yield lambda point, samples: live.log(point.step, point.values(), samples)
        status = "FINISHED"
    except StoppedError:
        status = "KILLED"
        raise
    finally:
        live.close(status)


def recover(trainer: Trainer, checkpoints: Path, run: str, model: Path, out: Path, report: Path) -> None:
    """Train to the last step, from the newest checkpoint of the run if there is one; write the model and its report.

    Raises:
        StoppedError: A signal stopped the training; a checkpoint is saved.
        InputError: The loss is not finite, or the gate is out of reach; the last checkpoint is kept.
    """
    kept, is_main = Checkpoints(checkpoints, run, open_store(), trainer.params.keep_checkpoints), trainer.engine.is_main
    training = {"seed": trainer.seed, "finetune": trainer.params.model_dump(mode="json")}
    with kept.hold(training) if is_main else nullcontext():
        try:
            with live_logging(run, trainer.params, trainer.engine) as listener:
                trainer.run(kept, listener)
        finally:
            kept.wait()  # an upload cannot go on once the interpreter shuts down
        if is_main:
            write(trainer, model, out, report)
            kept.clear()


def write(trainer: Trainer, model: Path, out: Path, report: Path) -> None:
    """Write the best average as a model folder, with the plan of the model it came from; and the curve."""
    with writing(out) as model_folder, writing(report) as report_folder:
        pipeline.write_pipeline(model_folder, trainer.best_ema, trainer.scheduler, model)
        pipeline.copy_plan(model, model_folder)
        _write_snapshots(trainer, model, model_folder / SNAPSHOTS)
        write_report(trainer.curve, trainer.samples, report_folder)
        for folder in (model_folder, report_folder):
            write_run_record(folder, "finetune", seed=trainer.seed, finetune=trainer.params)
    engine = trainer.params.engine
    setting = {"precision": engine.precision, "deterministic": engine.deterministic}
    clock = trainer.clock
    totals = {**clock.by_step, trainer.steps_done: clock.seconds} if clock.machine else {}
    times = {str(step): round(seconds, 3) for step, seconds in totals.items()}
    where = {"machine": device_name(), "alone": clock.alone}
    cost = {**trainer.cost, **setting, "seconds_by_step": times, **where}
    for folder in (out, report):  # the second one travels with the reports to MLflow
        write_provenance(folder, cost=cost)


def _write_snapshots(trainer: Trainer, model: Path, folder: Path) -> None:
    for step, unet in trainer.snapshots.models(trainer.best_ema):
        pipeline.write_pipeline(folder / str(step), unet, trainer.scheduler, model)
        pipeline.copy_plan(model, folder / str(step))
