"""Prune the pretrained model."""

from pathlib import Path

import click


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Numbers and choices.")
@click.option("--model", type=Path, required=True, help="Model folder to prune.")
@click.option("--importance", "importance_path", type=Path, help="Saliencies of that model.")
@click.option("--replay", "plan_path", type=Path, help="A plan made before, for this architecture, in their stead.")
@click.option("--data", type=Path, help="Packed images, for prune.compensate.")
@click.option("--out", type=Path, required=True, help="Where the smaller model goes.")
def main(
    params_path: Path, model: Path, importance_path: Path | None, plan_path: Path | None, data: Path | None, out: Path
) -> None:
    """Cut a diffusion model down to a smaller one that still runs."""
    from stages.params import load_params

    params = load_params(params_path)

    from stages import artifacts
    from stages.diffusion.device import select_device
    from stages.diffusion.models import read_scheduler, read_unet, write_pipeline
    from stages.provenance import write_run_record
    from stages.prune.pruning import calibration, prepare, prune_unet

    inputs = [path for path in (model, importance_path, plan_path, data) if path]
    artifacts.check_free(out, inputs=inputs, stage="prune")
    unet, scheduler = read_unet(model, select_device()), read_scheduler(model)
    images = calibration(unet, scheduler, data, params.prune, params.seed)
    plan = prepare(unet, importance_path, plan_path, params.prune, params.seed)
    pruned = prune_unet(unet, plan, images)
    with artifacts.writing(out) as folder:
        write_pipeline(folder, pruned, scheduler, model)
        artifacts.write_json(folder / artifacts.PLAN, plan.to_json())
        write_run_record(folder, "prune", seed=params.seed, prune=plan.prune)


if __name__ == "__main__":
    main()
