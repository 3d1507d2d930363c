"""The configs of the paper's models -> parameters and MACs, dense and pruned at one ratio."""

from pathlib import Path

import click
import torch

from stages import fetch
from stages.models.complexity import count_macs, count_params
from stages.models.families import FAMILIES, Denoiser
from stages.prune.surgery import cut
from stages.storage.files import read_json
from stages.tools.one_shot import plan_one_shot

SYSTEMS = Path(fetch.__file__).parent / "systems"
NAMES = sorted(path.stem for path in SYSTEMS.glob("*.json"))


def build(path: Path) -> Denoiser:
    """Build a model with random weights of seed 0 from the config file."""
    config = read_json(path)
    torch.manual_seed(0)
    unet: Denoiser = FAMILIES[config["_class_name"]].dense.from_config(config)
    return unet.eval()


def format_size(unet: Denoiser) -> str:
    """Format parameters and MACs with four decimals."""
    return f"{count_params(unet) / 1e6:.4f} M / {count_macs(unet) / 1e9:.4f} G"


@click.command()
@click.option("--system", multiple=True, type=click.Choice(NAMES), help="Model in stages/fetch/systems; default: all.")
@click.option(
    "--ratio", type=click.FloatRange(0, 0.95), default=0.3, help="Share of channels removed from every group."
)
def main(system: tuple[str, ...], ratio: float) -> None:
    """Print the sizes of the paper's models before and after pruning."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    rows = ["| model | dense | pruned |", "| --- | ---: | ---: |"]
    for path in sorted(SYSTEMS.glob("*.json")):
        if not system or path.stem in system:
            unet, no_images = build(path), torch.zeros(1)
            plan = plan_one_shot(unet, DDPMScheduler(), no_images, no_images, [], criterion="random", ratio=ratio)
            rows.append(f"| {path.stem} | {format_size(unet)} | {format_size(cut(unet, plan))} |")
            click.echo(rows[-1], err=True)
    click.echo("\n".join(rows))


if __name__ == "__main__":
    main()
