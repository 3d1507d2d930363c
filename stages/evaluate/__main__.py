"""Evaluate the dense, the pruned and the finetuned model."""

from pathlib import Path

import click


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Numbers and choices.")
@click.option("--dense", type=Path, required=True, help="Pretrained model folder.")
@click.option("--pruned", type=Path, required=True, help="Pruned model folder.")
@click.option("--finetuned", type=Path, required=True, help="Finetuned model folder.")
@click.option("--reference", "reference_path", type=Path, required=True, help="What the dense model drew.")
@click.option("--report", type=Path, required=True, help="Where metrics, tables and pictures go.")
def main(params_path: Path, dense: Path, pruned: Path, finetuned: Path, reference_path: Path, report: Path) -> None:
    """Measure how well the models draw, how alike, and what they cost, under the protocol of the reference."""
    from stages.params import load_params

    params = load_params(params_path)

    from stages import artifacts
    from stages.diffusion.codec import picture_shape, read_codec
    from stages.diffusion.device import select_device
    from stages.diffusion.models import check_images, read_scheduler, read_unet, weights_file
    from stages.evaluate.evaluation import evaluate
    from stages.evaluate.report import write_report
    from stages.protocol.extractors import Extractor
    from stages.protocol.protocol import check_current
    from stages.protocol.reference import read_reference
    from stages.provenance import write_run_record

    folders = {"dense": dense, "pruned": pruned, "finetuned": finetuned}
    artifacts.check_free(report, inputs=[*folders.values(), reference_path], stage="evaluate")
    device = select_device()
    models = {name: read_unet(folder, device) for name, folder in folders.items()}
    reference = read_reference(reference_path)
    codec = read_codec(dense, device)
    for unet in models.values():
        check_images(reference.samples[0], picture_shape(unet, codec), reference_path)
    extractor = Extractor(params.reference.extractor, params.reference.batch_size)
    scheduler = read_scheduler(dense)
    check_current(reference.protocol, params.reference, params.seed, scheduler, extractor, reference_path)
    files = {name: weights_file(folder) for name, folder in folders.items()}
    evaluation = evaluate(models, files, scheduler, reference, extractor, params.evaluate.costs, codec)
    with artifacts.writing(report) as folder:
        write_report(evaluation, folder)
        write_run_record(folder, "evaluate", seed=params.seed, reference=params.reference, evaluate=params.evaluate)


if __name__ == "__main__":
    main()
