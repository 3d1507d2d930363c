"""A pruned UNet2DModel whose groups were all pruned by one share -> a stock diffusers folder, without custom code."""

from pathlib import Path

from stages.models.families.family import NO_STOCK
from stages.models.own_code import is_own
from stages.models.pipeline import copy_plan, denoiser_folder, read_scheduler, read_unet, write_pipeline
from stages.models.stock import to_stock
from stages.runtime.errors import InputError
from stages.storage.files import check_free, read_json, writing
from stages.storage.provenance import write_run_record


def export_stock(model: Path, out: Path) -> float:
    """Write a pruned model as a folder that diffusers loads without custom code.

    Returns:
        The largest absolute difference between the outputs of the two models, over the largest absolute output.

    Raises:
        InputError: No stock config describes the channel counts, or `out` holds files that this command did not write.
    """
    check_free(out, inputs=[model], stage="export")
    scheduler = read_scheduler(model)
    place = denoiser_folder(model)
    if is_own(read_json(place / "config.json"), place):
        raise InputError(f"{NO_STOCK}; {place} has an own class")
    stock, error = to_stock(read_unet(model), scheduler.config["num_train_timesteps"])
    with writing(out) as folder:
        write_pipeline(folder, stock, scheduler, model)
        copy_plan(model, folder)
        write_run_record(folder, "export")
    return error
