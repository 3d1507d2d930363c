"""Compute the importance of every weight."""

import sys
from pathlib import Path

import click

from stages.runtime.parent import end_with_dvc


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Params file.")
@click.option("--model", type=Path, required=True, help="Pretrained model folder.")
@click.option("--data", type=Path, required=True, help="Packed images to calibrate on.")
@click.option("--out", type=Path, required=True, help="Output folder of the saliencies.")
@click.option("--report", type=Path, required=True, help="Output folder of losses and figures.")
@click.option(
    "--processes",
    "count",
    type=click.IntRange(1),
    help="Number of processes that share the timesteps; by default one for each GPU.",
)
def main(params_path: Path, model: Path, data: Path, out: Path, report: Path, count: int | None) -> None:
    """Measure how much the denoising loss depends on each weight."""
    from stages.importance.params import ImportanceParams
    from stages.runtime.schema import load_block, load_seed

    params = load_block(params_path, "importance", ImportanceParams)
    seed = load_seed(params_path)

    from stages.runtime.device import check_precision, select_device
    from stages.runtime.launch import count_processes, start_processes
    from stages.storage.files import check_free

    check_free(out, report, inputs=[model, data], stage="importance")
    device = select_device(deterministic=params.deterministic)
    check_precision(params.precision, "importance.precision", device)
    if (code := start_processes("importance", count_processes(count, device))) is not None:
        sys.exit(code)

    from stages.data.images import read_images
    from stages.importance.calibration import calibrate
    from stages.importance.report import write_report
    from stages.importance.stability import measure_diagnostics
    from stages.models.checks import check_conditions, check_images
    from stages.models.families import sample_shape
    from stages.models.pipeline import read_scheduler, read_unet
    from stages.models.saliency import write_importance
    from stages.models.steps import check_drawing
    from stages.runtime.processes import join
    from stages.storage.files import writing
    from stages.storage.provenance import write_provenance, write_run_record

    processes = join(device)
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


if __name__ == "__main__":
    end_with_dvc()
    main()
