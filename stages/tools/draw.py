"""A model and seeds -> a folder of PNGs."""

from pathlib import Path

from PIL import Image

from stages.data.grid import write_grid
from stages.drawing.labels import Labels
from stages.drawing.loaded import load_model
from stages.drawing.source import opened
from stages.models.sampling import draw
from stages.storage.files import check_free, writing
from stages.storage.provenance import write_run_record


def draw_images(
    model: str,
    out: Path,
    seeds: range,
    labels: Labels | None = None,
    params_path: Path | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
) -> None:
    """Draw one image from each seed: SEED.png, and grid.png with all of them.

    Args:
        model: Pipeline folder of a dense, pruned or finetuned model, or of a variant of one, or a version such as
            models:/NAME@champion.
        out: Folder to write.
        seeds: One per image; equal seeds give the images that a registered version serves.
        labels: Where the classes come from; None takes seed modulo the number of classes.
        params_path: As of `stages.drawing.source.opened`.
        steps: Sampling steps; None takes those of the params or of the version's protocol.
        batch_size: Images per batch; None likewise.

    Raises:
        InputError: A folder is damaged, the params do not fit the model, there is no such class, or `out` holds files
            that this command did not write.
    """
    labels = labels or Labels()
    with opened(model, params_path) as source:
        settings = source.settings.changed(steps, batch_size)
        check_free(out, inputs=[source.folder], stage="draw")
        loaded = load_model(source.folder, settings, labels, model)
        with writing(out) as temporary:  # before the images are drawn: it may be impossible
            pixels = draw(
                loaded.unet,
                loaded.scheduler,
                seeds,
                settings.sampler,
                precision=settings.precision,
                batch_size=settings.batch_size,
                label=model,
                context=loaded.context,
                labels=labels.of(loaded.context.table, seeds),
            )
            for seed, image in zip(seeds, pixels, strict=True):
                picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
                picture.save(temporary / f"{seed}.png")
            write_grid(pixels, temporary / "grid.png")
            write_run_record(temporary, "draw")
