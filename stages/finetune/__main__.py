"""Finetune the pruned model."""

from pathlib import Path

import click


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Numbers and choices.")
@click.option("--model", type=Path, required=True, help="Model folder to train.")
@click.option("--data", type=Path, required=True, help="Packed images.")
@click.option("--checkpoints", type=Path, required=True, help="Where a stopped training is picked up again.")
@click.option("--out", type=Path, required=True, help="Where the finetuned model goes.")
@click.option("--report", type=Path, required=True, help="Where the recovery curve goes.")
def main(params_path: Path, model: Path, data: Path, checkpoints: Path, out: Path, report: Path) -> None:
    """Recover a pruned model by a short training; a stopped training goes on where it was."""
    from stages.params import load_params

    params = load_params(params_path)

    from stages import artifacts
    from stages.diffusion import models
    from stages.diffusion.device import select_device
    from stages.finetune.checkpoint import Checkpoints
    from stages.finetune.report import write_report
    from stages.finetune.trainer import Trainer
    from stages.provenance import fingerprint, write_run_record
    from stages.storage import open_store

    artifacts.check_free(out, report, inputs=[model, data, checkpoints], stage="finetune")
    unet, scheduler = models.read_unet(model, select_device()), models.read_scheduler(model)
    images = artifacts.read_images(data)
    models.require_unconditional(unet, model)
    models.check_images(unet, images.train, data)
    run = fingerprint("finetune", [model, data], seed=params.seed, finetune=params.finetune)
    kept = Checkpoints(checkpoints, run, open_store())
    trainer = Trainer(unet, scheduler, images, params.finetune, params.seed)
    trainer.run(kept)
    with artifacts.writing(out) as model_folder, artifacts.writing(report) as report_folder:
        models.write_pipeline(model_folder, trainer.ema, scheduler)
        models.copy_plan(model, model_folder)
        write_report(trainer.curve, report_folder)
        for folder in (model_folder, report_folder):
            write_run_record(folder, "finetune", seed=params.seed, finetune=params.finetune)
    kept.clear()


if __name__ == "__main__":
    main()
