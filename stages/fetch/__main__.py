"""Fetch the pretrained model and its data."""

from pathlib import Path

import click


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Numbers and choices.")
@click.option("--model-out", type=Path, required=True, help="Where the pretrained model goes.")
@click.option("--data-out", type=Path, required=True, help="Where the packed images go.")
def main(params_path: Path, model_out: Path, data_out: Path) -> None:
    """Fetch the pretrained model and its data, and check both."""
    from stages.params import load_params

    params = load_params(params_path)

    from stages import artifacts, telemetry

    telemetry.switch_off()

    from stages.diffusion.codec import picture_shape, read_codec
    from stages.diffusion.device import select_device
    from stages.diffusion.models import read_class_table
    from stages.fetch import data, model
    from stages.provenance import write_run_record

    artifacts.check_free(model_out, data_out, stage="fetch")
    data.check_there(params.fetch.data)
    with artifacts.writing(model_out) as model_folder, artifacts.writing(data_out) as data_folder:
        unet = model.fetch_model(params.fetch.model, model_folder)
        codec, table = read_codec(model_folder, select_device()), read_class_table(model_folder)
        channels, size, _ = picture_shape(unet, codec)
        encode = codec.encode if codec else None
        data.fetch_data(
            params.fetch.data, (channels, size), params.fetch.heldout, data_folder, table=table, encode=encode
        )
        for folder in (model_folder, data_folder):
            write_run_record(folder, "fetch", fetch=params.fetch)


if __name__ == "__main__":
    main()
