"""The configs of the paper's models -> parameters and MACs, dense and pruned at one ratio."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from stages import fetch
from stages.importance.measure import measure_importance
from stages.models.complexity import count_macs, count_params
from stages.models.families import FAMILIES, Denoiser
from stages.models.plan import Plan
from stages.prune.depth import plan_depth
from stages.prune.params import PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.runtime.finite_range import FiniteRange
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
    """Plan a cut by random scores of seed 0, on which no size depends but that of `geglu: halves`."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    random = measure_importance(unet, DDPMScheduler(), [], [], criterion="random", formula="ldm")
    if params.depth:
        return plan_depth(unet, random, params, seed=0, batches=None)
    return plan_pruning(unet, random, params)


def plan_system(name: str, unet: Denoiser, ratio: float) -> Iterator[tuple[str, Plan]]:
    """Plan the cuts of a system: at one ratio, and what its authors or later papers compare with."""
    yield name, plan_random(unet, PruneParams(target={"ratio": ratio}))
    if name == "imagenet-ldm":
        yield f"{name}, cut as by its authors", plan_random(unet, PruneParams(target={"ratio": ratio}, **AUTHORS_LDM))
    if name == "imagenet-dit":
        yield f"{name}, ratio 0.5", plan_random(unet, PruneParams(target={"ratio": 0.5}))
        depth = PruneParams(target={"ratio": 0}, depth={"remove": 14, "order": "score"})
        yield f"{name}, 14 of 28 blocks", plan_random(unet, depth)
        mix = PruneParams(target={"macs": 0.5}, depth={"remove": 7, "order": "score"})
        yield f"{name}, 21 of 28 blocks and half of the MACs", plan_random(unet, mix)


def format_size(unet: Denoiser) -> str:
    """Format parameters and MACs with four decimals."""
    return f"{count_params(unet) / 1e6:.4f} M / {count_macs(unet) / 1e9:.4f} G"


@click.command()
@click.option("--system", multiple=True, type=click.Choice(NAMES), help="Model in stages/fetch/systems; default: all.")
@click.option("--ratio", type=FiniteRange(0, 0.95), default=0.3, help="Share of channels removed from every group.")
def main(system: tuple[str, ...], ratio: float) -> None:
    """Print the sizes of the paper's models before and after pruning."""
    rows = ["| model | dense | pruned |", "| --- | ---: | ---: |"]
    for path in sorted(SYSTEMS.glob("*.json")):
        if not system or path.stem in system:
            unet = build(path)
            for name, plan in plan_system(path.stem, unet, ratio):
                rows.append(f"| {name} | {format_size(unet)} | {format_size(cut(unet, plan))} |")
                click.echo(rows[-1], err=True)
    click.echo("\n".join(rows))


if __name__ == "__main__":
    main()
