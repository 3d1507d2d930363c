"""A model and images -> a short params.yaml for them; the command says what both are."""

from pathlib import Path
from typing import Any

import click

from stages.runtime.errors import InputError
from stages.runtime.finite_range import FiniteRange
from stages.runtime.imports import importing


def _show_keys(context: click.Context, _: click.Parameter, key: str | None) -> None:
    """Print the keys of a block and end, before the other options are asked for."""
    if key is not None:
        from stages.tools.initialise.keys import list_keys

        click.echo(list_keys(key))
        context.exit()


@click.command()
@click.option(
    "--keys",
    metavar="KEY",
    is_eager=True,
    expose_value=False,
    callback=_show_keys,
    help="Print what a key of params.yaml may be, such as prune, with all keys below it, and write nothing.",
)
@click.option(
    "--model",
    "model_text",
    required=True,
    metavar="MODEL",
    help="A diffusers folder, checkpoint file, OWNER/NAME[@REVISION] on the Hub, models:/NAME/VERSION or bundled:NAME.",
)
@click.option(
    "--data",
    "data_text",
    required=True,
    metavar="DATA",
    help="A folder of images, .npz file, OWNER/NAME[@REVISION] of a dataset on the Hub, or bundled:digits.",
)
@click.option("--out", type=Path, default=Path("params.yaml"), show_default=True, help="The file to write.")
@click.option("--force", is_flag=True, help="Overwrite the file if it is there.")
@click.option(
    "--ratio",
    type=FiniteRange(0, 1, max_open=True),
    help="Share of the channels to remove; by default 0.3, or more where 0.3 cuts nothing from most groups.",
)
@click.option("--macs", help="In place of --ratio: multiply-accumulates to keep, such as 56%.")
@click.option("--params", "num_params", help="In place of --ratio: parameters to keep, such as 56%.")
@click.option("--steps", type=click.IntRange(1), help="Steps of finetuning.")
@click.option("--batch-size", type=click.IntRange(1), help="Images in a step of finetuning.")
@click.option("--images", "num_images", type=click.IntRange(2), help="Images that each model draws in a set.")
@click.option("--sets", type=click.IntRange(1), help="Sets of images; two or more give intervals.")
@click.option("--sampler-steps", type=click.IntRange(1), help="Steps of the sampler.")
@click.option("--stride", type=click.IntRange(1), help="Distance between two timesteps of the importance.")
@click.option("--extractor", help="Feature extractor of FID, such as inception-v3-compat.")
@click.option(
    "--heldout", type=FiniteRange(0, 1, min_open=True, max_open=True), help="Share of the images that is held out."
)
@click.option(
    "--flip/--no-flip", default=None, help="Mirror half of the images in finetuning; wrong for digits and text."
)
@click.option("--system", help="Architecture of a checkpoint file, such as cifar10; by default the one that fits.")
@click.option("--trust", is_flag=True, help="Run denoiser.py of a model's own class; read it first.")
@click.option("--column", help="Image column of a dataset on the Hub.")
def init(
    model_text: str,
    data_text: str,
    out: Path,
    ratio: float | None,
    macs: str | None,
    num_params: str | None,
    system: str | None,
    column: str | None,
    *,
    heldout: float | None,
    force: bool,
    trust: bool,
    **given: Any,  # noqa: ANN401  # the fields of `Chosen`
) -> None:
    """Look at a model and at images, say what they are, and write a short params.yaml for them.

    Values that no option gives are chosen so that the whole run takes twenty to thirty minutes on this machine.
    """
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; give the name of a file in it")
    if out.exists() and not force:
        raise InputError(f"{out} is there already; give --force to overwrite it, or another --out")
    if not out.parent.is_dir():
        raise InputError(f"the folder {out.parent} does not exist; create it, or give another --out")
    sizes = {"ratio": ratio, "macs": macs, "params": num_params}
    target = {name: value for name, value in sizes.items() if value is not None}
    if len(target) > 1:
        raise InputError("give one of --ratio, --macs and --params")

    with importing():
        from stages.storage.files import write_atomically
        from stages.tools.initialise.sources import data_source, model_sources
        from stages.tools.initialise.starter import HELDOUT, Chosen, describe, make_params, open_first
        from stages.tools.params_yaml import to_yaml

    share = HELDOUT if heldout is None else heldout
    start, model = open_first(model_sources(model_text, system, trust=trust), data_source(data_text, column), share)
    lines = list(describe(start))
    text = to_yaml(make_params(start, model, Chosen(target=target, **given)), " ".join(lines[0].split()[1:]))
    write_atomically(out, text.encode())
    copied = "" if out == Path("params.yaml") else "copy it to params.yaml, then "
    next_line = f"{out} is written. Next: {copied}espalier plan, then espalier run"
    click.echo("\n".join([*lines, "", text.rstrip(), "", next_line]))
