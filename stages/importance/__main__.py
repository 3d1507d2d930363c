"""Compute the importance of every weight."""

from pathlib import Path

import click

from stages.runtime.imports import importing
from stages.runtime.options import processes_option
from stages.runtime.parent import end_with_dvc


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Params file.")
@click.option("--model", type=Path, required=True, help="Pretrained model folder.")
@click.option("--data", type=Path, required=True, help="Packed images to calibrate on.")
@click.option("--out", type=Path, required=True, help="Output folder of the saliencies.")
@click.option("--report", type=Path, required=True, help="Output folder of losses and figures.")
@processes_option("the timesteps")
def main(params_path: Path, model: Path, data: Path, out: Path, report: Path, count: int | None) -> None:
    """Measure how much the denoising loss depends on each weight."""
    from stages.importance.params import ImportanceParams
    from stages.models.trust import trusting_params
    from stages.runtime.schema import load_block, load_seed

    params = load_block(params_path, "importance", ImportanceParams)
    seed = load_seed(params_path)
    click.get_current_context().with_resource(trusting_params(params_path))

    with importing():
        from stages.runtime.device import check_precision, select_device
        from stages.runtime.launch import distribute
        from stages.storage.files import check_free

    check_free(out, report, inputs=[model, data], stage="importance")
    device = select_device(deterministic=params.deterministic)
    check_precision(params.precision, "importance.precision", device)
    processes = distribute("importance", count, device)

    with importing():
        from stages.importance.folders import measure_folders

    measure_folders(model, data, out, report, params_path, params, seed, processes)


if __name__ == "__main__":
    end_with_dvc()
    main()
