"""The configs of the paper's models -> parameters and MACs, dense and pruned at one ratio."""

from pathlib import Path
from typing import Any

import click
import torch

from stages import fetch
from stages.importance.measure import measure_importance
from stages.models.complexity import count_macs, count_params
from stages.models.families import FAMILIES, Denoiser
from stages.models.plan import Plan
from stages.prune.params import PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.storage.files import read_json

SYSTEMS = Path(fetch.__file__).parent / "systems"
NAMES = sorted(path.stem for path in SYSTEMS.glob("*.json"))
AUTHORS_LDM: dict[str, Any] = {"round_to": 2, "geglu": "halves", "exclude": ("up_blocks.3.resnets.2.conv2",)}
"""How the authors' code cuts LDM-4 (docs/presets/imagenet-ldm.md)."""


def build(path: Path, **changes: Any) -> Denoiser:  # noqa: ANN401  # values of a config
    """Build a model with random weights of seed 0 from the config file; keywords change the config."""
    config = {**read_json(path), **changes}
    torch.manual_seed(0)
    unet: Denoiser = FAMILIES[config["_class_name"]].dense.from_config(config)
    return unet.eval()


def plan_random(unet: Denoiser, params: PruneParams) -> Plan:
    """Plan a cut by random scores of seed 0, on which only the widths of `geglu: halves` depend."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    random = measure_importance(unet, DDPMScheduler(), [], [], criterion="random", formula="ldm")
    return plan_pruning(unet, random, params)


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
    rows = ["| model | dense | pruned |", "| --- | ---: | ---: |"]
    for path in sorted(SYSTEMS.glob("*.json")):
        if not system or path.stem in system:
            unet = build(path)
            plans = {path.stem: plan_random(unet, PruneParams(target={"ratio": ratio}))}
            if path.stem == "imagenet-ldm":
                chosen = PruneParams(target={"ratio": ratio}, **AUTHORS_LDM)
                plans[f"{path.stem}, cut as by its authors"] = plan_random(unet, chosen)
            for name, plan in plans.items():
                rows.append(f"| {name} | {format_size(unet)} | {format_size(cut(unet, plan))} |")
                click.echo(rows[-1], err=True)
    click.echo("\n".join(rows))


if __name__ == "__main__":
    main()
