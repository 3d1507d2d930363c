"""Draw with the dense model what all others are compared with."""

from pathlib import Path

import click


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Numbers and choices.")
@click.option("--model", type=Path, required=True, help="Pretrained model folder.")
@click.option("--data", type=Path, required=True, help="Packed images to compare with.")
@click.option("--out", type=Path, required=True, help="Where samples and features go.")
def main(params_path: Path, model: Path, data: Path, out: Path) -> None:
    """Draw the dense model's images and extract features of them and of the real ones, under one protocol."""
    from stages.params import load_params

    params = load_params(params_path)

    from stages import artifacts, packed
    from stages.diffusion import models
    from stages.diffusion.codec import picture_shape
    from stages.diffusion.device import select_device
    from stages.protocol.extractors import Extractor
    from stages.protocol.protocol import bias_warning, make_protocol
    from stages.protocol.reference import write_reference
    from stages.provenance import write_run_record
    from stages.reference.reference import find_companions, make_reference

    artifacts.check_free(out, inputs=[model, data], stage="reference")
    unet, scheduler = models.read_unet(model, select_device()), models.read_scheduler(model)
    images = packed.read_images(data)
    companions = find_companions(unet, model, images.conditions, params.reference.guidance)
    models.check_images(images.pixels, picture_shape(unet, companions.codec), data)
    extractor = Extractor(params.reference.extractor, params.reference.batch_size)
    real = packed.Chosen(images.pixels, packed.spread(len(images.pixels), params.reference.real_images))
    protocol = make_protocol(params.reference, params.seed, scheduler, real, extractor)
    reference = make_reference(unet, scheduler, real, protocol, extractor, companions)
    if warning := bias_warning(protocol, reference.real_features.shape[1]):
        click.echo(f"Warning: {warning}", err=True)
    with artifacts.writing(out) as folder:
        write_reference(folder, reference)
        write_run_record(folder, "reference", seed=params.seed, reference=params.reference)


if __name__ == "__main__":
    main()
