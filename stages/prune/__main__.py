"""Prune the pretrained model."""

from pathlib import Path

import click

from stages.runtime.imports import importing
from stages.runtime.parent import end_with_dvc


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Params file.")
@click.option("--model", type=Path, required=True, help="Model folder to prune.")
@click.option("--importance", "importance_path", type=Path, help="Saliencies of that model.")
@click.option(
    "--replay", "plan_path", type=Path, help="Plan of an earlier pruning of this architecture, instead of --importance."
)
@click.option("--data", type=Path, help="Packed images, for prune.compensate.")
@click.option("--out", type=Path, required=True, help="Output folder of the smaller model.")
def main(
    params_path: Path, model: Path, importance_path: Path | None, plan_path: Path | None, data: Path | None, out: Path
) -> None:
    """Prune a diffusion model to the target size."""
    from stages.models.trust import trusting_params
    from stages.prune.params import PruneParams
    from stages.runtime.schema import load_block, load_seed

    params = load_block(params_path, "prune", PruneParams)
    seed = load_seed(params_path)
    click.get_current_context().with_resource(trusting_params(params_path))

    with importing():
        from stages.models.composition import compose
        from stages.models.layout import PLAN
        from stages.models.pipeline import read_scheduler, read_unet, write_pipeline
        from stages.prune.earlier import read_earlier
        from stages.prune.pruning import make_plan, prune_unet, read_calibration, read_depth_calibration
        from stages.runtime.device import select_device
        from stages.storage.files import check_free, write_json, writing
        from stages.storage.provenance import write_provenance, write_run_record

    inputs = [path for path in (model, importance_path, plan_path, data) if path]
    check_free(out, inputs=inputs, stage="prune")
    unet, scheduler = read_unet(model, select_device()), read_scheduler(model)
    images = read_calibration(unet, scheduler, data, params.compensate, seed)
    earlier = read_earlier(model, unet)
    batches = read_depth_calibration(unet, scheduler, data, None if plan_path else params.depth, seed)
    plan = make_plan(unet, importance_path, plan_path, params, seed, earlier, batches)
    total = compose(earlier, plan) if earlier else plan
    pruned = prune_unet(unet, plan, images)
    with writing(out) as folder:
        write_pipeline(folder, pruned, scheduler, model)
        write_json(folder / PLAN, total.to_json())
        write_run_record(folder, "prune", seed=seed, prune=plan.prune)
    write_provenance(out)


if __name__ == "__main__":
    end_with_dvc()
    main()
