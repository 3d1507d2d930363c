"""Evaluate the dense, the pruned and the finetuned model."""

import sys
from pathlib import Path

import click

from stages.runtime.parent import end_with_dvc


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Params file.")
@click.option("--dense", type=Path, required=True, help="Pretrained model folder.")
@click.option("--pruned", type=Path, required=True, help="Pruned model folder.")
@click.option("--finetuned", type=Path, required=True, help="Finetuned model folder.")
@click.option("--reference", "reference_path", type=Path, required=True, help="Folder that the reference stage wrote.")
@click.option("--report", type=Path, required=True, help="Output folder.")
@click.option(
    "--processes",
    "count",
    type=click.IntRange(1),
    help="Number of processes that share the images; by default one for each GPU.",
)
def main(
    params_path: Path,
    dense: Path,
    pruned: Path,
    finetuned: Path,
    reference_path: Path,
    report: Path,
    count: int | None,
) -> None:
    """Measure image quality and similarity to the dense model under the protocol of the reference."""
    from stages.protocol.params import ReferenceParams
    from stages.runtime.schema import load_block, load_seed

    params = load_block(params_path, "reference", ReferenceParams)
    seed = load_seed(params_path)

    from stages.runtime.device import check_precision, select_device
    from stages.runtime.launch import count_processes, start_processes
    from stages.storage.files import check_free

    folders = {"dense": dense, "pruned": pruned, "finetuned": finetuned}
    check_free(report, inputs=[*folders.values(), reference_path], stage="evaluate")
    device = select_device()
    check_precision(params.precision, "reference.precision", device)
    if (code := start_processes("evaluate", count_processes(count, device), report)) is not None:
        sys.exit(code)

    from stages.evaluate.evaluation import evaluate
    from stages.evaluate.report import write_report
    from stages.models.autoencoder import image_shape, read_autoencoder
    from stages.models.checks import check_images
    from stages.models.pipeline import read_scheduler, read_unet, weights_file
    from stages.protocol.extractors import Extractor
    from stages.protocol.protocol import check_current
    from stages.protocol.reference import read_reference
    from stages.runtime.processes import join
    from stages.storage.provenance import write_provenance, write_run_record
    from stages.storage.rows import scratch_folder, writing_together

    processes = join(device)
    models = {name: read_unet(folder, processes.device) for name, folder in folders.items()}
    reference = read_reference(reference_path)
    autoencoder = read_autoencoder(dense, processes.device)
    for unet in models.values():
        check_images(reference.samples[0], image_shape(unet, autoencoder), reference_path)
    extractor = Extractor(params.extractor, params.batch_size)
    scheduler = read_scheduler(dense)
    check_current(reference.protocol, params, seed, scheduler, extractor, reference_path)
    files = {name: weights_file(folder) for name, folder in folders.items()}
    with writing_together(report, processes) as folder:
        with scratch_folder(folder, processes) as scratch:
            evaluation = evaluate(models, files, scheduler, reference, extractor, scratch, autoencoder, processes)
        if evaluation:
            write_report(evaluation, folder)
            write_run_record(folder, "evaluate", seed=seed, reference=params)
    if processes.is_main:
        write_provenance(report)


if __name__ == "__main__":
    end_with_dvc()
    main()
