"""Prune the pretrained model."""

from pathlib import Path

import click


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Numbers and choices.")
@click.option("--model", type=Path, required=True, help="Model folder to prune.")
@click.option("--importance", "importance_path", type=Path, required=True, help="Saliencies of that model.")
@click.option("--out", type=Path, required=True, help="Where the smaller model goes.")
def main(params_path: Path, model: Path, importance_path: Path, out: Path) -> None:
    """Cut a diffusion model down to a smaller one that still runs."""
    from stages.params import load_params

    params = load_params(params_path)

    from stages import artifacts
    from stages.diffusion.models import PLAN, read_scheduler, read_unet, write_pipeline
    from stages.provenance import write_run_record
    from stages.prune.pruning import prune_unet

    artifacts.check_free(out, inputs=[model, importance_path])
    unet, scheduler = read_unet(model), read_scheduler(model)
    importance = artifacts.read_importance(importance_path)
    pruned, plan = prune_unet(unet, importance, params.prune, params.seed)
    with artifacts.writing(out) as folder:
        write_pipeline(folder, pruned, scheduler, model)
        artifacts.write_json(folder / PLAN, plan.to_json())
        write_run_record(folder, "prune", seed=params.seed, prune=params.prune)


if __name__ == "__main__":
    main()
