"""Build the variants of the models and measure them."""

from pathlib import Path

import click

from stages.runtime.imports import importing
from stages.runtime.parent import end_with_dvc


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Params file.")
@click.option("--dense", type=Path, required=True, help="Pretrained model folder.")
@click.option("--pruned", type=Path, required=True, help="Pruned model folder.")
@click.option("--finetuned", type=Path, required=True, help="Finetuned model folder.")
@click.option("--reference", "reference_path", type=Path, required=True, help="Folder that the reference stage wrote.")
@click.option("--out", type=Path, required=True, help="Output folder of the variants, one folder each.")
@click.option("--report", type=Path, required=True, help="Output folder of their quality.")
def main(
    params_path: Path, dense: Path, pruned: Path, finetuned: Path, reference_path: Path, out: Path, report: Path
) -> None:
    """Write variants of the models, and measure their images under the protocol of the reference.

    Without variants in params.yaml, the outputs are an empty table.
    """
    from stages.models.trust import trusting_params
    from stages.variants.params import read_params

    params = read_params(params_path)
    click.get_current_context().with_resource(trusting_params(params_path))

    with importing():
        from stages.storage.files import check_free
        from stages.variants.outputs import write_outputs

    models = {"dense": dense, "pruned": pruned, "finetuned": finetuned}
    check_free(out, report, inputs=[*models.values(), reference_path], stage="variants")
    write_outputs(params, models, reference_path, out, report)


if __name__ == "__main__":
    end_with_dvc()
    main()
