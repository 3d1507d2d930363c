"""Evaluate the dense, the pruned and the finetuned model."""

from pathlib import Path

import click


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Numbers and choices.")
@click.option("--dense", type=Path, required=True, help="Pretrained model folder.")
@click.option("--pruned", type=Path, required=True, help="Pruned model folder.")
@click.option("--finetuned", type=Path, required=True, help="Finetuned model folder.")
@click.option("--data", type=Path, required=True, help="Packed images to compare with.")
@click.option("--report", type=Path, required=True, help="Where metrics, table and pictures go.")
def main(params_path: Path, dense: Path, pruned: Path, finetuned: Path, data: Path, report: Path) -> None:
    """Measure how well the models draw, how alike, and what they cost."""
    from stages.params import load_params

    params = load_params(params_path)

    from stages import artifacts
    from stages.diffusion.device import select_device
    from stages.diffusion.models import check_images, read_scheduler, read_unet, require_unconditional
    from stages.evaluate.compare import compare
    from stages.evaluate.report import write_report
    from stages.provenance import write_run_record

    artifacts.check_free(report, inputs=[dense, pruned, finetuned, data])
    device, folders = select_device(), {"dense": dense, "pruned": pruned, "finetuned": finetuned}
    models = {name: read_unet(folder, device) for name, folder in folders.items()}
    real = artifacts.read_images(data).train
    require_unconditional(models["dense"], dense)
    check_images(models["dense"], real, data)
    comparison = compare(models, read_scheduler(dense), real, params.evaluate, params.seed)
    with artifacts.writing(report) as folder:
        write_report(comparison, folder)
        write_run_record(folder, "evaluate", seed=params.seed, evaluate=params.evaluate)


if __name__ == "__main__":
    main()
