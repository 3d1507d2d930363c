"""Finetune the pruned model."""

import sys
from pathlib import Path

import click

from stages.runtime.imports import importing
from stages.runtime.options import processes_option
from stages.runtime.parent import end_with_dvc


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Params file.")
@click.option("--model", type=Path, required=True, help="Model folder to train.")
@click.option(
    "--rounds", "rounds_path", type=Path, help="Output of the rounds stage; a model in it is trained instead."
)
@click.option("--teacher", type=Path, help="Dense model that it was pruned from, for distillation.")
@click.option("--data", type=Path, required=True, help="Packed images.")
@click.option(
    "--checkpoints", type=Path, required=True, help="Folder of checkpoints, from which a stopped training resumes."
)
@click.option("--out", type=Path, required=True, help="Output folder of the model.")
@click.option("--report", type=Path, required=True, help="Output folder of the recovery curve.")
@processes_option("each batch")
def main(
    params_path: Path,
    model: Path,
    teacher: Path | None,
    data: Path,
    checkpoints: Path,
    out: Path,
    report: Path,
    *,
    rounds_path: Path | None,
    count: int | None,
) -> None:
    """Finetune a pruned model; a stopped training resumes from its last checkpoint."""
    from stages.finetune.params import FinetuneParams
    from stages.models.params import RoundsParams
    from stages.models.trust import trusting_params
    from stages.runtime.schema import load_block, load_seed

    rounds = load_block(params_path, "rounds", RoundsParams)
    params = load_block(params_path, "finetune", FinetuneParams).after_rounds(rounds)
    seed = load_seed(params_path)
    click.get_current_context().with_resource(trusting_params(params_path))

    with importing():
        from stages.finetune.launch import launch
        from stages.models.layout import latest_model
        from stages.runtime.device import check_precision, select_device
        from stages.storage.files import check_free

    model = latest_model(model, rounds_path, rounds.count)
    inputs = [path for path in (model, data, teacher) if path]
    check_free(out, report, inputs=[*inputs, checkpoints], stage="finetune")
    device = select_device(deterministic=params.engine.deterministic)
    check_precision(params.engine.precision, "finetune.engine.precision", device)
    key, divided = params.divided
    if (code := launch(count, device, divided, params.engine.accumulate, key)) is not None:
        sys.exit(code)

    with importing():
        from stages.finetune.recovery import finetune_folders

    finetune_folders(model, teacher, data, checkpoints, out, report, params=params, seed=seed, device=device)


if __name__ == "__main__":
    end_with_dvc()
    main()
