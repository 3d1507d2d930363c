"""A model folder and seeds -> a folder of PNGs."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from stages.data.grid import write_grid
from stages.data.images import Table
from stages.fetch.class_embedding import read_class_embedding
from stages.models.autoencoder import read_autoencoder
from stages.models.pipeline import read_scheduler
from stages.models.sampling import SamplingContext, check_guidance, draw
from stages.models.variants.folder import read_model
from stages.protocol.params import ReferenceParams
from stages.runtime.device import check_precision, select_device
from stages.runtime.errors import InputError
from stages.runtime.schema import load_block
from stages.storage.files import check_free, writing
from stages.storage.provenance import write_run_record


def draw_images(model: Path, out: Path, seeds: Sequence[int], label: int | None, params_path: Path) -> None:
    """Draw one image from each seed, with sampler, guidance and precision of the block reference of a params file.

    Args:
        model: Pipeline folder of a dense, pruned or finetuned model, or of a variant of one.
        out: Folder to write: SEED.png for each seed, and grid.png.
        seeds: One per image; equal seeds give the images that a registered version serves.
        label: Class of all images; None takes seed modulo the number of classes.
        params_path: The params file.

    Raises:
        InputError: A folder is damaged, the params do not fit the model, there is no such class, or `out` holds files
            that no command wrote.
    """
    params = load_block(params_path, "reference", ReferenceParams)
    check_free(out, inputs=[model])
    device = select_device()
    check_precision(params.precision, "reference.precision", device)
    unet = read_model(model, device)
    table = read_class_embedding(unet, model)
    check_guidance(table, params.guidance, "reference", model)
    context = SamplingContext(read_autoencoder(model, device), table, params.guidance)
    pixels = draw(
        unet,
        read_scheduler(model),
        seeds,
        params.sampler,
        precision=params.precision,
        batch_size=params.batch_size,
        label=str(model),
        context=context,
        labels=_labels(table, seeds, label),
    )
    with writing(out) as folder:
        for seed, image in zip(seeds, pixels, strict=True):
            Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(folder / f"{seed}.png")
        write_grid(pixels, folder / "grid.png")
        write_run_record(folder, "tools")


def _labels(table: Table | None, seeds: Sequence[int], label: int | None) -> list[int]:
    """Return the class of each image; none for an unconditional model.

    Raises:
        InputError: The model has no such class.
    """
    if table is None:
        if label is not None:
            raise InputError(f"--label {label}: the model is unconditional; leave --label out")
        return []
    num_classes = len(table) - 1
    if label is not None and label >= num_classes:
        raise InputError(f"--label {label}: the model has {num_classes} classes; give 0 to {num_classes - 1}")
    return [seed % num_classes if label is None else label for seed in seeds]
