"""Draw the reference images of the dense model."""

from pathlib import Path

import click

from stages.runtime.imports import importing
from stages.runtime.options import processes_option
from stages.runtime.parent import end_with_dvc


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Params file.")
@click.option("--model", type=Path, required=True, help="Pretrained model folder.")
@click.option("--data", type=Path, required=True, help="Packed real images.")
@click.option("--out", type=Path, required=True, help="Output folder of samples and features.")
@processes_option("the images")
def main(params_path: Path, model: Path, data: Path, out: Path, count: int | None) -> None:
    """Draw the dense model's images, and extract features of them and of the real images, under one protocol."""
    from stages.models.trust import trusting_params
    from stages.protocol.params import ReferenceParams
    from stages.runtime.schema import load_block, load_seed

    params = load_block(params_path, "reference", ReferenceParams)
    seed = load_seed(params_path)
    click.get_current_context().with_resource(trusting_params(params_path))

    with importing():
        from stages.runtime.device import check_precision, select_device
        from stages.runtime.launch import distribute
        from stages.storage.files import check_free

    check_free(out, inputs=[model, data], stage="reference")
    device = select_device()
    check_precision(params.precision, "reference.precision", device)
    processes = distribute("reference", count, device, out)

    with importing():
        from stages.reference.folders import draw_reference

    draw_reference(model, data, out, params_path, params, seed, processes)


if __name__ == "__main__":
    end_with_dvc()
    main()
