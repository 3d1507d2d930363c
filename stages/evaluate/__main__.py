"""Evaluate the dense, the pruned and the finetuned model."""

from pathlib import Path

import click

from stages.runtime.imports import importing
from stages.runtime.options import processes_option
from stages.runtime.parent import end_with_dvc


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Params file.")
@click.option("--dense", type=Path, required=True, help="Pretrained model folder.")
@click.option("--pruned", type=Path, required=True, help="Pruned model folder.")
@click.option("--finetuned", type=Path, required=True, help="Finetuned model folder.")
@click.option("--reference", "reference_path", type=Path, required=True, help="Folder that the reference stage wrote.")
@click.option("--report", type=Path, required=True, help="Output folder.")
@processes_option("the images")
def main(
    params_path: Path,
    dense: Path,
    pruned: Path,
    finetuned: Path,
    reference_path: Path,
    report: Path,
    count: int | None,
) -> None:
    """Measure image quality and similarity to the dense model under the protocol of the reference.

    Snapshots in the folder of the finetuned model are measured likewise.
    """
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

    folders = {"dense": dense, "pruned": pruned, "finetuned": finetuned}
    check_free(report, inputs=[*folders.values(), reference_path], stage="evaluate")
    device = select_device()
    check_precision(params.precision, "reference.precision", device)
    processes = distribute("evaluate", count, device, report)

    with importing():
        from stages.evaluate.folders import evaluate_folders, find_snapshots

    folders |= find_snapshots(finetuned)
    evaluate_folders(folders, reference_path, report, params, seed, processes)


if __name__ == "__main__":
    end_with_dvc()
    main()
