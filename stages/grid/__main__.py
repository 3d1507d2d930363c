"""Compare dense and pruned models over steps, samplers and guidance scales."""

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from stages.runtime.imports import importing
from stages.runtime.stage_outputs import beside_the_pipeline
from stages.runtime.stopping import stop_in_one_line


@click.command()
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Its blocks reference and grid.")
@click.option("--artifacts", type=Path, default=Path("artifacts"), help="Folder of the models and the reference.")
@click.option("--out", type=Path, default=Path("reports/grid"), callback=beside_the_pipeline, help="Output folder.")
@click.option("--store", type=Path, default=Path("checkpoints/grid"), help="Where finished cells are kept.")
@click.option("--steps", metavar="N,…", help="Numbers of steps, such as 5,10,20,50.")
@click.option("--guidance", metavar="SCALE,…", help="Guidance scales, such as 1,2,4.")
@click.option("--sampler", "samplers", multiple=True, metavar="NAME[:SPACING]", help="A sampler; may be repeated.")
@click.option("--model", "models", multiple=True, help="pruned or finetuned, beside dense; may be repeated.")
@click.option("--num-images", metavar="N", help="Images of a set.")
@click.option("--sets", metavar="N", help="Number of sets; intervals need two.")
def main(params_path: Path, artifacts: Path, out: Path, store: Path, **options: object) -> None:
    """Draw with dense and pruned models at several steps, samplers and guidance scales, and show where each is best.

    Options replace keys of the block grid of params.yaml, which may be missing. The stages reference and finetune must
    have run. Finished cells are kept, so that a stopped grid goes on and a larger one measures only what is new.
    """
    stop_in_one_line((signal.SIGINT, signal.SIGTERM))
    from stages.grid.params import GridParams, OptionalGrid
    from stages.models.trust import trusting_params
    from stages.protocol.params import ReferenceParams
    from stages.runtime.schema import load_block, load_seed, read_yaml, validate_tree

    click.get_current_context().with_resource(trusting_params(params_path))
    reference, seed = load_block(params_path, "reference", ReferenceParams), load_seed(params_path)
    block: dict[str, object] = (read_yaml(params_path, OptionalGrid).grid or GridParams()).model_dump()
    tree: dict[str, object] = {"grid": block | read_options(options)}
    grid = validate_tree(tree, OptionalGrid, "the grid").grid or GridParams()

    with importing():
        from stages.grid.grid import hold_store, open_grid_context, run_grid
        from stages.grid.report import write_report
        from stages.report.grid_text import summarise
        from stages.runtime.device import check_precision, select_device
        from stages.storage.files import check_free, writing
        from stages.storage.provenance import write_provenance

    folders = {"dense": artifacts / "pretrained"} | {str(name): artifacts / name for name in grid.models}
    inputs = [*folders.values(), artifacts / "reference"]
    check_free(out, inputs=[*inputs, store], stage="grid")
    check_store(store, inputs)
    device = select_device()
    check_precision(reference.precision, "reference.precision", device)
    context, base = open_grid_context(folders, artifacts / "reference", grid, reference, seed, device, store)
    with hold_store(store):
        record = run_grid(context, base, grid, reference, folders["dense"])
        with writing(out) as folder:
            write_report(record, grid, folder)
        write_provenance(out)
    click.echo(summarise(record))
    click.echo(f"Look at it: {out / 'index.html'}")


def check_store(store: Path, inputs: Sequence[Path]) -> None:
    """Refuse to keep cells inside an input, which would change it.

    Raises:
        InputError: The folder is one of the inputs or lies in one.
    """
    from stages.runtime.errors import InputError

    for folder in inputs:
        if store.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"--store {store} lies in {folder}, which the grid reads; choose another folder")


def read_options(options: Mapping[str, object]) -> dict[str, object]:
    """Convert the options of the command line to keys of the block grid, whose types check them."""
    found: dict[str, object] = {}
    for name, value in options.items():
        if isinstance(value, str):
            found[name] = value.split(",") if name in ("steps", "guidance") else value
        elif isinstance(value, Sequence) and value:
            found[name] = [_read_sampler(str(text)) for text in value] if name == "samplers" else list(value)
    return found


def _read_sampler(text: str) -> dict[str, str]:
    scheduler, colon, spacing = text.partition(":")
    return {"scheduler": scheduler, "spacing": spacing} if colon else {"scheduler": scheduler}


if __name__ == "__main__":
    main()
