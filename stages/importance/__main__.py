"""Compute the importance of every weight."""

from pathlib import Path

import click


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Numbers and choices.")
@click.option("--model", type=Path, required=True, help="Pretrained model folder.")
@click.option("--data", type=Path, required=True, help="Packed images to calibrate on.")
@click.option("--out", type=Path, required=True, help="Where the saliencies go.")
@click.option("--report", type=Path, required=True, help="Where the losses over the timesteps go.")
def main(params_path: Path, model: Path, data: Path, out: Path, report: Path) -> None:
    """Measure how much each weight matters to the denoising loss."""
    from stages.params import load_params

    params = load_params(params_path)

    from stages import artifacts, packed
    from stages.diffusion.device import select_device
    from stages.diffusion.families import sample_shape
    from stages.diffusion.models import check_conditions, check_images, read_scheduler, read_unet
    from stages.importance.calibration import calibrate
    from stages.importance.report import write_report
    from stages.importance.stability import judge
    from stages.provenance import write_run_record

    artifacts.check_free(out, report, inputs=[model, data], stage="importance")
    unet, scheduler = read_unet(model, select_device()), read_scheduler(model)
    images = packed.read_images(data)
    check_conditions(unet, images.conditions, data)
    check_images(images.train, sample_shape(unet), data)
    importance = calibrate(unet, scheduler, images, params.importance, params.seed)
    heat, stability = judge(importance, unet, scheduler, images, params.importance, params.seed)
    with artifacts.writing(out) as out_folder, artifacts.writing(report) as report_folder:
        artifacts.write_importance(out_folder, importance)
        write_report(importance, heat, stability, report_folder)
        for folder in (out_folder, report_folder):
            write_run_record(folder, "importance", seed=params.seed, importance=params.importance)


if __name__ == "__main__":
    main()
