"""Prune the pretrained model in several rounds, with a short recovery after each but the last."""

from pathlib import Path

import click

from stages.runtime.imports import importing
from stages.runtime.parent import end_with_dvc


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Params file.")
@click.option("--model", type=Path, required=True, help="Pretrained model folder.")
@click.option("--importance", type=Path, required=True, help="Saliencies of that model, for the first round.")
@click.option("--data", type=Path, required=True, help="Packed images.")
@click.option(
    "--checkpoints", type=Path, required=True, help="Folder of finished rounds, from which a stopped run resumes."
)
@click.option("--out", type=Path, required=True, help="Output folder of the model; without one if rounds.count is 1.")
def main(params_path: Path, model: Path, importance: Path, data: Path, checkpoints: Path, out: Path) -> None:
    """Prune to sizes between that of the dense model and the target, each with a short recovery, and to the target."""
    from stages.models.trust import trusting_params
    from stages.rounds.params import read_params

    params = read_params(params_path)
    click.get_current_context().with_resource(trusting_params(params_path))

    from stages.storage.files import check_free, writing
    from stages.storage.provenance import write_provenance, write_run_record

    check_free(out, inputs=[model, importance, data, checkpoints], stage="rounds")
    work = None
    with writing(out) as folder:
        if params.rounds.count > 1:
            with importing():
                from stages.rounds.rounds import Inputs, clear, write_rounds

            work = write_rounds(params, Inputs(model, importance, data), checkpoints, folder)
        write_run_record(folder, "rounds", seed=params.seed, rounds=params.rounds)
    write_provenance(out)
    if work is not None:
        clear(work)


if __name__ == "__main__":
    end_with_dvc()
    main()
