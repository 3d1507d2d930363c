"""The paper's CIFAR-10 UNet -> time of its importance measurement, compared with the loop of the original code."""

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import click
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from benchmarks.sizes import SYSTEMS, build
from stages.importance.criteria import squared_taylor
from stages.importance.measure import CalibrationBatch, measure_importance
from stages.importance.stability import RankingStability, compare_rankings
from stages.models.families import Denoiser
from stages.models.groups import find_groups
from stages.models.saliency import Importance
from stages.models.scores import score_group
from stages.prune.params import PruneParams, Target
from stages.prune.selection import plan_pruning
from stages.runtime.device import kernels
from stages.storage.tensors import tensors_sha256

RATIO = PruneParams(target=Target(ratio=0.3))
MODES = {
    "plain": {},
    "exact": {"timesteps_per_pass": 4},
    "fast": {"timesteps_per_pass": 4, "precision": "bfloat16"},
}


def draw_batch(
    batch_size: int,
    seed: int = 0,
    shape: tuple[int, int, int] = (3, 32, 32),
    device: torch.device | None = None,
) -> CalibrationBatch:
    """Draw random images [B, *shape] and noise, by default of CIFAR-10's size and on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    images, noise = torch.randn(2, batch_size, *shape, generator=generator).to(device or "cpu")
    return CalibrationBatch(images.clamp(-1, 1), noise)


def plain_loop(
    unet: Denoiser,
    scheduler: DDPMScheduler,
    batch: CalibrationBatch,
    timesteps: range,
    sha256: str | None = None,
) -> Importance:
    """Repeat the original's loop: one timestep per pass, gradients of all parameters.

    The weights are hashed unless their hash is given.
    """
    unet.zero_grad(set_to_none=True)
    losses, largest = [], 0.0
    for timestep in timesteps:
        timesteps_of_batch = torch.full((len(batch.images),), timestep, device=batch.images.device)
        noisy = scheduler.add_noise(batch.images, batch.noise, timesteps_of_batch)
        loss = (unet(noisy, timesteps_of_batch).sample - batch.noise).square().sum(dim=(1, 2, 3)).mean()
        largest = max(largest, loss.item())
        if loss.item() < 0.05 * largest:
            break
        losses.append(loss.item())
        loss.backward()
    layers = {name: layer for name, layer in unet.named_modules() if hasattr(layer, "weight")}
    with torch.no_grad():
        saliency = {name: squared_taylor(layer, layer.weight.grad) for name, layer in layers.items()}
    unet.zero_grad(set_to_none=True)
    sha256 = sha256 or tensors_sha256(unet.state_dict())
    return Importance("diff-pruning", "paper", sha256, False, list(timesteps), [losses], "float32", saliency)  # noqa: FBT003


def set_attention(unet: Denoiser, processor: Callable[[], object]) -> None:
    """Set the attention processor of all layers."""
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(processor())


def measure(mode: str, unet: Denoiser, batch: CalibrationBatch, timesteps: range) -> tuple[float, Importance]:
    """Measure the importance in one mode; returns seconds and importance."""
    set_attention(unet, AttnProcessor if mode == "plain" else AttnProcessor2_0)
    begin = time.perf_counter()
    with kernels(deterministic=mode != "plain"):
        if mode == "plain":
            importance = plain_loop(unet, DDPMScheduler(), batch, timesteps)
        else:
            importance = measure_importance(
                unet,
                DDPMScheduler(),
                [batch],
                timesteps,
                criterion="diff-pruning",
                formula="paper",
                threshold=0.05,
                **MODES[mode],
            )
    return time.perf_counter() - begin, importance


def compare_selections(unet: Denoiser, one: Importance, two: Importance) -> tuple[int, RankingStability]:
    """Count the channels that only one of two selections cuts, and compare the rankings of all channels."""
    cuts = [plan_pruning(unet, importance, RATIO).groups for importance in (one, two)]
    differing = sum(len(set(a.cut) ^ set(b.cut)) for a, b in zip(*cuts, strict=True))
    groups = find_groups(unet)
    return differing, compare_rankings(groups, [[score_group(g, i, {}) for g in groups] for i in (one, two)])


def peak_mib(num_timesteps: int, num_draws: int, batch_size: int) -> float:
    """Measure the peak memory of the exact mode in a separate process."""
    code = f"from benchmarks.importance import print_peak; print_peak({num_timesteps}, {num_draws}, {batch_size})"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout  # noqa: S603
    return float(output.split()[-1])


def print_peak(num_timesteps: int, num_draws: int, batch_size: int) -> None:
    """Measure importance and print the peak memory of this process in MiB."""
    unet = build(SYSTEMS / "cifar10.json")

    def draws() -> Iterator[CalibrationBatch]:
        """Draw the batches, one at a time."""
        yield from (draw_batch(batch_size, seed) for seed in range(num_draws))

    timesteps = range(0, num_timesteps * 4, 4)
    measure_importance(
        unet, DDPMScheduler(), draws(), timesteps, criterion="taylor", formula="paper", timesteps_per_pass=4
    )
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


@click.command()
@click.option("--batch-size", type=click.IntRange(1), default=4, help="Calibration images.")
@click.option(
    "--spacing", type=click.IntRange(1, 500), default=16, help="Distance of the timesteps in plain and exact."
)
@click.option("--stride", type=click.IntRange(1), default=4, help="Fast uses every n-th of these timesteps.")
@click.option(
    "--rounds", type=click.IntRange(1), default=3, help="Runs of each mode, in turn; the table shows medians."
)
@click.option("--model", type=Path, default=SYSTEMS / "cifar10.json", help="Config of the model.")
def main(batch_size: int, spacing: int, stride: int, rounds: int, model: Path) -> None:
    """Time the three modes in turn, and compare the channels that they select."""
    unet, batch, timesteps = build(model), draw_batch(batch_size), range(0, 1000, spacing)
    timesteps_of = {"plain": timesteps, "exact": timesteps, "fast": timesteps[::stride]}
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    importances = {}
    for mode in MODES:
        measure(mode, unet, batch, timesteps[:2])
    for number in range(rounds):
        for mode in MODES if number % 2 == 0 else reversed(MODES):
            spent, importances[mode] = measure(mode, unet, batch, timesteps_of[mode])
            seconds[mode].append(spent)
    print("| mode | precision | kernels | timesteps | seconds | speed-up | differing channels | Spearman | overlap |")
    print("| --- | --- | --- |" + " ---: |" * 6)
    for mode in MODES:
        differing, agreement = compare_selections(unet, importances["plain"], importances[mode])
        ratios = [one / two for one, two in zip(seconds["plain"], seconds[mode], strict=True)]
        print(
            f"| {mode} | {importances[mode].precision} | {'chosen for speed' if mode == 'plain' else 'deterministic'} "
            f"| {len(timesteps_of[mode])} | {median(seconds[mode]):.1f} | {median(ratios):.2f}× "
            f"| {differing} | {agreement.spearman:.4f} | {agreement.overlap:.4f} |"
        )
    print("\n| timesteps | draws | peak memory |\n| ---: | ---: | ---: |")
    for num_timesteps, num_draws in ((8, 1), (32, 1), (8, 4)):
        print(f"| {num_timesteps} | {num_draws} | {peak_mib(num_timesteps, num_draws, batch_size):.0f} MiB |")


if __name__ == "__main__":
    main()
