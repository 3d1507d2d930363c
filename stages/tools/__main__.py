"""Command line of the tools: python -m stages.tools NAME."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from stages.runtime.stage_outputs import beside_the_pipeline

FORMATS = ["parquet", "webdataset"]
"""Formats of the shards of `draw`."""


@click.group()
def main() -> None:
    """Run a command that is not a stage of the pipeline."""


@main.command()
@click.argument("one", type=Path)
@click.argument("other", type=Path)
@click.option("--model", default="finetuned", help="Name of the model to compare, such as pruned.")
def diff(one: Path, other: Path, model: str) -> None:
    """Print the difference of each metric between two evaluation folders, OTHER minus ONE, for one model."""
    from stages.tools.diff import diff_evaluations, version_warning

    differences = diff_evaluations(one, other, model)
    if warning := version_warning(one, other):
        click.echo(f"Warning: {warning}", err=True)
    for name, difference in differences.items():
        text = f"{name:<10} {difference.mean:+.6g}"
        if difference.half_width is not None:
            verdict = "differs" if difference.is_distinct else "no difference beyond the interval"
            text += f" ± {difference.half_width:.3g}, {verdict}"
        click.echo(text)


@main.command()
@click.option("--model", type=Path, required=True, help="Pruned model folder.")
@click.option("--out", type=Path, required=True, callback=beside_the_pipeline, help="Output folder of the stock model.")
def export(model: Path, out: Path) -> None:
    """Write a pruned model as a stock UNet2DModel; needs channel counts that a stock config can describe."""
    from stages.tools.export import export_stock

    error = export_stock(model, out)
    click.echo(f"largest difference of an output, relative to the largest output: {error:.1e}")


@main.command()
@click.option("--adapter", type=Path, required=True, help="LoRA of the dense model: a safetensors file or its folder.")
@click.option("--plan", type=Path, required=True, help="The pruned model's pruning_plan.json.")
@click.option("--model", type=Path, default=None, help="A model of this plan; by default the folder of the plan.")
@click.option(
    "--out",
    type=Path,
    required=True,
    callback=beside_the_pipeline,
    help="Output folder of the adapter for the pruned model.",
)
def lora(adapter: Path, plan: Path, model: Path | None, out: Path) -> None:
    """Slice a LoRA that was made for the dense model by the channels that a pruning plan keeps."""
    from stages.tools.lora.adapter import describe, slice_adapter_file

    click.echo(describe(slice_adapter_file(adapter, plan, model, out)))


@main.command()
@click.option(
    "--model", default="artifacts/finetuned", help="Model folder, or a version such as models:/NAME@champion."
)
@click.option(
    "--out",
    required=True,
    callback=beside_the_pipeline,
    help="Output folder of the images; of shards also s3://BUCKET/PREFIX.",
)
@click.option("--num-images", type=click.IntRange(1), default=16, help="Number of images.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Seed of the first image; +1 for each next.")
@click.option("--seeds", metavar="A:B", default=None, help="Seeds A to B - 1, in place of --num-images and --seed.")
@click.option("--label", type=click.IntRange(0), default=None, help="Class of all images; by default all in turn.")
@click.option("--labels", type=Path, default=None, help="File with the class of each image, one in each line.")
@click.option(
    "--format", type=click.Choice(["png", *FORMATS]), default="png", help="Files of images, or shards of them."
)
@click.option("--shard-size", type=click.IntRange(1), default=None, help="Images of a shard; by default 16 batches.")
@click.option("--shards", metavar="A:B", default=None, help="Draw the shards A to B - 1 alone.")
@click.option("--jobs", type=click.IntRange(1), default=None, help="Processes; by default one for each GPU or core.")
@click.option("--check", is_flag=True, help="Draw nothing; compare the finished shards with their hashes.")
@click.option("--steps", type=click.IntRange(1), default=None, help="Sampling steps, in place of those of the params.")
@click.option("--batch-size", type=click.IntRange(1), default=None, help="Images of a batch, likewise.")
@click.option("--params", "params_path", type=Path, default=Path("params.yaml"), help="Its block reference applies.")
@click.option("--trust", is_flag=True, help="Run denoiser.py of a model's own class; read it first.")
@click.pass_context
def draw(context: click.Context, /, **given: Any) -> None:  # noqa: ANN401  # the options
    """Draw images with a model, each from its own seed, by the sampler of params.yaml.

    With --format png: SEED.png each, and grid.png with all of them. With parquet or webdataset: shards, which several
    processes and machines draw at once, and manifest.json with their hashes. The same command continues a job that was
    stopped. A version is drawn by the sampler that it was measured with, unless --params is given.

    Equal seeds give equal images, and the dense, the pruned and the finetuned model nearly the same ones.
    """
    from stages.models.trust import trusting
    from stages.tools.draw_options import run

    explicit = {name for name in given if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    with trusting(is_trusted=given["trust"]):
        click.echo(run(given, explicit))


@main.command()
@click.argument("model", metavar="MODEL_OR_VERSION")
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="Everybody may read it; by default a new repository is private.")
@click.option("--dry-run", is_flag=True, help="List files and sizes; send nothing.")
def push(model: str, repo: str, *, public: bool, dry_run: bool) -> None:
    """Push a released model, a folder or models:/NAME/3, to the Hugging Face Hub in one commit.

    The token is that of HF_TOKEN or of `hf auth login`.
    """
    from stages.tools.hub.errors import check_repository
    from stages.tools.hub.push import check_token, opened, push

    check_repository(repo)  # before files are hashed or a version is downloaded
    if not dry_run:
        check_token()
    with opened(model) as release:
        click.echo("\n".join(release.lines()))
        if dry_run:
            click.echo(f"dry run: nothing was sent to {repo}, which would be {'public' if public else 'private'}")
            return
        commit = push(release, repo, public=public)
        click.echo(f"{repo} at {commit} holds these files; to get them back:")
        click.echo(f"espalier pull {repo} --revision {commit} --sha256 {release.sha256} --out FOLDER")


@main.command()
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--revision", default="main", help="A commit, branch or tag.")
@click.option("--sha256", default=None, help="Hash of files.json that push printed; pins every file.")
@click.option("--out", type=Path, required=True, callback=beside_the_pipeline, help="Output folder of the model.")
def pull(repo: str, revision: str, sha256: str | None, out: Path) -> None:
    """Pull a model that `espalier push` sent to the Hugging Face Hub, and check the hash of every file."""
    from stages.tools.hub.pull import pull

    found = pull(repo, revision, sha256, out)
    click.echo(f"{found.num_files} files of {repo} at {found.commit} are as listed; files.json has {found.sha256}")


@main.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Overwrite uncommitted changes of params.yaml.")
def preset(name: str, *, force: bool) -> None:
    """Replace params.yaml with the preset NAME of recipes/presets."""
    from stages.tools.preset import PARAMS, choose_preset

    choose_preset(name, force=force)
    click.echo(f"{PARAMS} is now the preset {name}")


@main.command()
@click.option("--cells", type=Path, required=True, help="Folder with one subfolder per finished cell.")
@click.option(
    "--out", type=Path, required=True, callback=beside_the_pipeline, help="Output folder of the table and the plot."
)
@click.option("--baseline", default="", help="Cell whose setting the others are compared with, seed by seed.")
def sweep_table(cells: Path, out: Path, baseline: str) -> None:
    """Compare the finished cells of a sweep; protocols may differ in the seed alone."""
    from stages.tools.comparison.sweep_table import write_sweep_table

    write_sweep_table(cells, out, baseline)
    click.echo((out / "table.md").read_text(), nl=False)


@main.command()
@click.option("--cells", type=Path, required=True, help="Folder with one subfolder per finished cell.")
@click.option(
    "--out", type=Path, required=True, callback=beside_the_pipeline, help="Output folder of the table and the plots."
)
@click.option("--preset", required=True, help="Preset whose published numbers are added to the table.")
@click.option("--command", default="", help="Command that made the cells; printed below the table.")
def method_table(cells: Path, out: Path, preset: str, command: str) -> None:
    """Compare pruning methods over several seeds, with differences paired by seed."""
    from stages.tools.comparison.method_table import write_method_table

    write_method_table(cells, out, preset, command)
    click.echo((out / "table.md").read_text(), nl=False)


@main.command()
@click.option("--cells", type=Path, required=True, help="Folder with one subfolder per finished cell.")
@click.option(
    "--out", type=Path, required=True, callback=beside_the_pipeline, help="Output folder of the tables and the plot."
)
@click.option(
    "--rows", required=True, metavar="ROW,…", help="Recipes and methods in their order; the first is compared with."
)
@click.option("--preset", required=True, help="Preset that was recovered; the title of the tables.")
@click.option("--command", default="", help="Command that made the cells; printed below the tables.")
def curve_table(cells: Path, out: Path, rows: str, preset: str, command: str) -> None:
    """Compare what recovery costs by several recipes: quality over steps and seconds, with intervals over seeds."""
    from stages.tools.comparison.curve_table import write_curve_table

    write_curve_table(cells, out, rows.split(","), preset, command)
    click.echo((out / "table.md").read_text(), nl=False)


if __name__ == "__main__":
    main()
