"""A pruned UNet2DModel whose groups all lost the same share -> a stock diffusers folder, with no code of ours."""

from pathlib import Path

from stages.models.pipeline import copy_plan, read_scheduler, read_unet, write_pipeline
from stages.models.stock import to_stock
from stages.storage.files import check_free, writing
from stages.storage.provenance import write_run_record


def export_stock(model: Path, out: Path) -> float:
    """Write a pruned model as a stock folder.

    Returns:
        The largest difference of an output, relative to the largest output.

    Raises:
        InputError: The widths are not those of any stock config, or `out` is not free.
    """
    check_free(out, inputs=[model])
    scheduler = read_scheduler(model)
    stock, error = to_stock(read_unet(model), scheduler.config["num_train_timesteps"])
    with writing(out) as folder:
        write_pipeline(folder, stock, scheduler, model)
        copy_plan(model, folder)
        write_run_record(folder, "tools")
    return error
