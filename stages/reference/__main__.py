"""Draw the reference images of the dense model."""

import sys
from pathlib import Path

import click

from stages.runtime.parent import end_with_dvc


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Params file.")
@click.option("--model", type=Path, required=True, help="Pretrained model folder.")
@click.option("--data", type=Path, required=True, help="Packed real images.")
@click.option("--out", type=Path, required=True, help="Output folder of samples and features.")
@click.option(
    "--processes",
    "count",
    type=click.IntRange(1),
    help="Number of processes that share the images; see docs/scaling.md.",
)
def main(params_path: Path, model: Path, data: Path, out: Path, count: int | None) -> None:
    """Draw the dense model's images, and extract features of them and of the real images, under one protocol."""
    from stages.protocol.params import ReferenceParams
    from stages.runtime.schema import load_block, load_seed

    params = load_block(params_path, "reference", ReferenceParams)
    seed = load_seed(params_path)

    from stages.runtime.device import check_precision, select_device
    from stages.runtime.launch import count_processes, start_processes
    from stages.storage.files import check_free

    check_free(out, inputs=[model, data], stage="reference")
    device = select_device()
    check_precision(params.precision, "reference.precision", device)
    if (code := start_processes("reference", count_processes(count, device), out)) is not None:
        sys.exit(code)

    from stages.data.images import RowSelection, evenly_spaced, read_images
    from stages.models.autoencoder import image_shape
    from stages.models.checks import check_images
    from stages.models.pipeline import read_scheduler, read_unet
    from stages.models.steps import check_drawing
    from stages.protocol.extractors import Extractor
    from stages.protocol.protocol import bias_warning, make_protocol
    from stages.reference.reference import load_context, make_reference
    from stages.runtime.processes import join
    from stages.storage.provenance import write_provenance, write_run_record
    from stages.storage.rows import writing_together

    processes = join(device)
    unet, scheduler = read_unet(model, processes.device), read_scheduler(model)
    check_drawing(params_path, scheduler)
    images = read_images(data)
    context = load_context(unet, model, images.conditions, params.guidance)
    check_images(images.pixels, image_shape(unet, context.autoencoder), data)
    extractor = Extractor(params.extractor, params.batch_size)
    real = RowSelection(images.pixels, evenly_spaced(len(images.pixels), params.real_images))
    protocol = make_protocol(params, seed, scheduler, real, extractor)
    with writing_together(out, processes) as folder:
        num_features = make_reference(unet, scheduler, real, protocol, extractor, folder, context, processes)
        if processes.is_main:
            write_run_record(folder, "reference", seed=seed, reference=params)
    if processes.is_main:
        if warning := bias_warning(protocol, num_features):
            click.echo(f"Warning: {warning}", err=True)
        write_provenance(out)


if __name__ == "__main__":
    end_with_dvc()
    main()
