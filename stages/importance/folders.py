"""A model folder and packed images -> the folders of the importance and of its report."""

from pathlib import Path

import click

from stages.importance.calibration import calibrate
from stages.importance.params import ImportanceParams
from stages.importance.partial import PartialSum
from stages.importance.report import write_report
from stages.importance.stability import measure_diagnostics
from stages.models.checks import read_fitting_images
from stages.models.pipeline import read_scheduler, read_unet
from stages.models.saliency import write_importance
from stages.models.steps import check_drawing
from stages.runtime.processes import Processes
from stages.storage.files import file_sha256, read_json, writing
from stages.storage.provenance import fingerprint, write_provenance, write_run_record

CHECKPOINTS = Path("checkpoints/importance")
"""Where a measurement in progress is kept, below the current folder."""


def measure_folders(
    model: Path,
    data: Path,
    out: Path,
    report: Path,
    params_path: Path,
    params: ImportanceParams,
    seed: int,
    processes: Processes,
) -> None:
    """Measure the importance of a model folder's weights and its diagnostics, and write both.

    Args:
        model: The dense model.
        data: The packed images to calibrate on.
        out: The folder of the saliencies.
        report: The folder of losses and figures.
        params_path: The params file, whose other blocks must be drawable, too.
        params: The block importance.
        seed: Of all draws.
        processes: Share the timesteps.

    Raises:
        InputError: A folder is damaged, the two do not fit, or a loss or gradient is not finite.
    """
    unet, scheduler = read_unet(model, processes.device), read_scheduler(model)
    check_drawing(params_path, scheduler)
    images = read_fitting_images(data, unet)
    partial = _open_partial(model, data, params, seed, processes)
    importance = calibrate(unet, scheduler, images, params, seed, processes, partial)
    heat, stability = measure_diagnostics(importance, unet, scheduler, images, params, seed, processes)
    if not processes.is_main:
        return
    with writing(out) as out_folder, writing(report) as report_folder:
        write_importance(out_folder, importance)
        write_report(importance, heat, stability, report_folder)
        for folder in (out_folder, report_folder):
            write_run_record(folder, "importance", seed=seed, importance=params)
    write_provenance(out)
    partial.clear()


def _open_partial(model: Path, data: Path, params: ImportanceParams, seed: int, processes: Processes) -> PartialSum:
    """Return where the sum is kept: in a file named by everything that decides it; nowhere for several processes."""
    if processes.count > 1:
        if processes.is_main:
            click.echo(
                f"{processes.count} processes share the timesteps; if they are stopped, they begin again", err=True
            )
        return PartialSum()
    labels = [path for name in ("train_labels.npy", "conditions.npy") if (path := data / name).is_file()]
    known = {"data": read_json(data / "dataset.json"), "labels": [file_sha256(path) for path in labels]}
    run = fingerprint("importance", [model], importance=params, seed=seed, known=known)
    return PartialSum(CHECKPOINTS / f"{run[:16]}.safetensors")
