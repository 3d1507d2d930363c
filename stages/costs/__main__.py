"""Time the dense, the pruned and the finetuned model."""

from pathlib import Path

import click

from stages.runtime.imports import importing
from stages.runtime.parent import end_with_dvc


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Params file.")
@click.option("--dense", type=Path, required=True, help="Pretrained model folder.")
@click.option("--pruned", type=Path, required=True, help="Pruned model folder.")
@click.option("--finetuned", type=Path, required=True, help="Finetuned model folder.")
@click.option("--report", type=Path, required=True, help="Output folder.")
def main(params_path: Path, dense: Path, pruned: Path, finetuned: Path, report: Path) -> None:
    """Measure time, throughput and memory of a forward pass of each model on this device."""
    from stages.costs.params import CostsParams
    from stages.models.trust import trusting_params
    from stages.runtime.schema import load_block

    params = load_block(params_path, "costs", CostsParams)
    click.get_current_context().with_resource(trusting_params(params_path))

    with importing():
        from stages.costs.report import write_report
        from stages.costs.timing import measure_costs
        from stages.models.pipeline import read_unet, weights_file
        from stages.protocol.costs import CostsRecord
        from stages.runtime.device import select_device
        from stages.storage.files import check_free, file_sha256, writing
        from stages.storage.provenance import write_provenance, write_run_record

    folders = {"dense": dense, "pruned": pruned, "finetuned": finetuned}
    check_free(report, inputs=list(folders.values()), stage="costs")
    device = select_device(deterministic=params.deterministic)
    models = {name: read_unet(folder, device) for name, folder in folders.items()}
    hashes = {name: file_sha256(weights_file(folder)) for name, folder in folders.items()}
    record = CostsRecord(weights_sha256=hashes, costs=measure_costs(models, params))
    with writing(report) as folder:
        write_report(record, folder)
        write_run_record(folder, "costs", costs=params)
    write_provenance(report)


if __name__ == "__main__":
    end_with_dvc()
    main()
