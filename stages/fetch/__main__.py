"""Fetch the pretrained model and its data."""

from pathlib import Path

import click

from stages.runtime.imports import importing
from stages.runtime.parent import end_with_dvc


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Params file.")
@click.option("--model-out", type=Path, required=True, help="Output folder of the model.")
@click.option("--data-out", type=Path, required=True, help="Output folder of the packed images.")
def main(params_path: Path, model_out: Path, data_out: Path) -> None:
    """Fetch the pretrained model and its data, and check both."""
    from stages.fetch.params import FetchParams
    from stages.runtime.schema import load_block

    params = load_block(params_path, "fetch", FetchParams)

    from stages.runtime import telemetry
    from stages.runtime.environment import check_numbers
    from stages.storage.files import check_free, writing

    telemetry.switch_off()
    check_numbers()

    with importing():
        from stages.fetch import data, model, source_images
        from stages.models.autoencoder import image_shape, read_autoencoder
        from stages.models.pipeline import read_scheduler
        from stages.models.steps import check_drawing
        from stages.runtime.device import select_device
        from stages.storage.provenance import write_provenance, write_run_record

    check_free(model_out, data_out, stage="fetch")
    source_images.check_path(params.data)
    with writing(model_out) as model_folder, writing(data_out) as data_folder:
        unet, table = model.fetch_model(params.model, model_folder)
        check_drawing(params_path, read_scheduler(model_folder))
        autoencoder = read_autoencoder(model_folder, select_device())
        shape = image_shape(unet, autoencoder)
        encode = autoencoder.encode if autoencoder else None
        data.fetch_data(params.data, shape, params.heldout, data_folder, table=table, encode=encode)
        for folder in (model_folder, data_folder):
            write_run_record(folder, "fetch", fetch=params)
    write_provenance(model_out)


if __name__ == "__main__":
    end_with_dvc()
    main()
