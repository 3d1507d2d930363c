"""A pruned UNet2DModel whose groups all lost the same share -> a stock diffusers folder, with no code of ours."""

from pathlib import Path

import click


@click.command()
@click.option("--model", type=Path, required=True, help="Pruned model folder.")
@click.option("--out", type=Path, required=True, help="Where the stock folder goes.")
def main(model: Path, out: Path) -> None:
    """Write a pruned model as a stock UNet2DModel, where its widths allow it."""
    from stages import artifacts
    from stages.diffusion.models import copy_plan, read_scheduler, read_unet, write_pipeline
    from stages.diffusion.stock import to_stock
    from stages.provenance import write_run_record

    artifacts.check_free(out, inputs=[model])
    scheduler = read_scheduler(model)
    stock, error = to_stock(read_unet(model), scheduler.config["num_train_timesteps"])
    with artifacts.writing(out) as folder:
        write_pipeline(folder, stock, scheduler, model)
        copy_plan(model, folder)
        write_run_record(folder, "export")
    click.echo(f"largest difference of an output, relative to the largest output: {error:.1e}")


if __name__ == "__main__":
    main()
