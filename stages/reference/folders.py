"""A model folder and packed images -> the folder of the reference."""

from pathlib import Path

import click

from stages.data.images import RowSelection, evenly_spaced, read_images
from stages.models.autoencoder import image_shape
from stages.models.checks import check_images
from stages.models.pipeline import read_scheduler, read_unet
from stages.models.steps import check_drawing
from stages.protocol.extractors import Extractor
from stages.protocol.params import ReferenceParams
from stages.protocol.protocol import bias_warning
from stages.protocol.resolve import make_protocol
from stages.reference.reference import load_context, make_reference
from stages.runtime.processes import Processes
from stages.storage.provenance import write_provenance, write_run_record
from stages.storage.rows import writing_together


def draw_reference(
    model: Path, data: Path, out: Path, params_path: Path, params: ReferenceParams, seed: int, processes: Processes
) -> None:
    """Draw the reference of a model folder, and write it.

    Args:
        model: The dense model.
        data: The packed real images.
        out: The folder to write.
        params_path: The params file, whose other blocks must be drawable, too.
        params: The block reference.
        seed: Of all draws.
        processes: Share the images.

    Raises:
        InputError: A folder is damaged, the two do not fit, or the params do not fit the model.
    """
    unet, scheduler = read_unet(model, processes.device), read_scheduler(model)
    check_drawing(params_path, scheduler)
    images = read_images(data)
    context = load_context(unet, model, images.conditions, params.guidance)
    check_images(images.pixels, image_shape(unet, context.autoencoder), data)
    extractor = Extractor(params.extractor, params.batch_size)
    real = RowSelection(images.pixels, evenly_spaced(len(images.pixels), params.real_images))
    protocol = make_protocol(params, seed, scheduler, real, extractor, processes)
    with writing_together(out, processes) as folder:
        num_features = make_reference(unet, scheduler, real, protocol, extractor, folder, context, processes)
        if processes.is_main:
            write_run_record(folder, "reference", seed=seed, reference=params)
    if processes.is_main:
        if warning := bias_warning(protocol, num_features):
            click.echo(f"Warning: {warning}", err=True)
        write_provenance(out)
