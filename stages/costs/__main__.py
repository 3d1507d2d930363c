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
@click.option("--variants", type=Path, help="Output of the variants stage; each of them is measured as well.")
@click.option("--report", type=Path, required=True, help="Output folder.")
def main(params_path: Path, dense: Path, pruned: Path, finetuned: Path, variants: Path | None, report: Path) -> None:
    """Measure time, throughput and memory of a forward pass of each model and variant on this device."""
    from stages.costs.params import CostsParams
    from stages.models.trust import trusting_params
    from stages.runtime.schema import load_block

    params = load_block(params_path, "costs", CostsParams)
    click.get_current_context().with_resource(trusting_params(params_path))

    with importing():
        from stages.costs.report import write_report
        from stages.costs.timing import measure_costs
        from stages.costs.variants import measure_variants, read_candidates
        from stages.models.pipeline import read_unet, weights_file
        from stages.protocol.costs import VARIANT_COSTS, CostsRecord
        from stages.runtime.device import select_device
        from stages.storage.files import check_free, file_sha256, write_json, writing
        from stages.storage.provenance import write_provenance, write_run_record

    folders = {"dense": dense, "pruned": pruned, "finetuned": finetuned}
    check_free(report, inputs=[*folders.values(), *([variants] if variants else [])], stage="costs")
    device = select_device(deterministic=params.deterministic)
    models = {name: read_unet(folder, device) for name, folder in folders.items()}
    hashes = {name: file_sha256(weights_file(folder)) for name, folder in folders.items()}
    record = CostsRecord(weights_sha256=hashes, costs=measure_costs(models, params))
    candidates = read_candidates(models, hashes, variants, device) if variants else {}
    with writing(report) as folder:
        write_report(record, folder)
        if candidates:
            files = {name: candidate.sha256 for name, candidate in candidates.items()}
            of_variants = CostsRecord(weights_sha256=files, costs=measure_variants(candidates, params))
            write_json(folder / VARIANT_COSTS, of_variants.model_dump(mode="json"))
        write_run_record(folder, "costs", costs=params)
    write_provenance(report)


if __name__ == "__main__":
    end_with_dvc()
    main()
