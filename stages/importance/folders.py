"""A model folder and packed images -> the folders of the importance and of its report."""

from pathlib import Path

from stages.data.images import read_images
from stages.importance.calibration import calibrate
from stages.importance.params import ImportanceParams
from stages.importance.report import write_report
from stages.importance.stability import measure_diagnostics
from stages.models.checks import check_conditions, check_images
from stages.models.families import sample_shape
from stages.models.pipeline import read_scheduler, read_unet
from stages.models.saliency import write_importance
from stages.models.steps import check_drawing
from stages.runtime.processes import Processes
from stages.storage.files import writing
from stages.storage.provenance import write_provenance, write_run_record


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
    images = read_images(data)
    check_conditions(unet, images.conditions, data)
    check_images(images.train, sample_shape(unet), data)
    importance = calibrate(unet, scheduler, images, params, seed, processes)
    heat, stability = measure_diagnostics(importance, unet, scheduler, images, params, seed, processes)
    if not processes.is_main:
        return
    with writing(out) as out_folder, writing(report) as report_folder:
        write_importance(out_folder, importance)
        write_report(importance, heat, stability, report_folder)
        for folder in (out_folder, report_folder):
            write_run_record(folder, "importance", seed=seed, importance=params)
    write_provenance(out)
