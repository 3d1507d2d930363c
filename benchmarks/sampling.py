"""A pretrained model -> images per second, compared with diffusers' own pipeline at the same settings."""

import copy
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import click
import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler

from stages.fetch.model import BUNDLED
from stages.models.families import Denoiser
from stages.models.params import SamplerParams
from stages.models.pipeline import read_scheduler, read_unet
from stages.models.sampling import cast_model, draw, image_seeds
from stages.runtime.device import has_tf32, kernels, select_device

MODEL = BUNDLED / "digits"
Draw = Callable[[], np.ndarray]
DIFFUSERS = "diffusers, float32"
"""What the variants are compared with."""


def draw_with_diffusers(pipeline: DDIMPipeline, seeds: list[int], steps: int, batch_size: int) -> np.ndarray:
    """Draw images with the plain pipeline, one generator per image."""
    batches = []
    for start in range(0, len(seeds), batch_size):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
        (images,) = pipeline(
            len(generators), generators, num_inference_steps=steps, output_type="pt", return_dict=False
        )
        batches.append((images.float() * 255).round().to(torch.uint8).cpu().numpy())
    return np.concatenate(batches)


def variants(model: Path, seeds: list[int], steps: int, batch_size: int, *, compiled: bool) -> dict[str, Draw]:
    """Prepare the functions to time; models are cast, laid out and wrapped for compilation here.

    The pipeline runs with the kernels that PyTorch chooses, Espalier with deterministic ones, as a user has them.
    """
    device = select_device()
    unet, scheduler = read_unet(model, device), read_scheduler(model)
    pipeline = DDIMPipeline(unet, DDIMScheduler.from_config(scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    half = cast_model(unet, "bfloat16")
    models: dict[str, Denoiser] = {
        "float32": unet,
        **({"tf32": unet} if has_tf32(device) else {}),
        "bfloat16": half,
        "bfloat16, channels_last": copy.deepcopy(half).to(memory_format=torch.channels_last),
    }
    if compiled:
        models |= {f"{name}, compiled": torch.compile(models[name], dynamic=False) for name in ("float32", "bfloat16")}
    ours = partial(draw, scheduler=scheduler, seeds=seeds, sampler=SamplerParams(steps=steps), batch_size=batch_size)
    drawn = {
        f"Espalier, {name}": partial(ours, unet=network, precision=name.partition(",")[0], label=name)
        for name, network in models.items()
    }
    pipe = kernels(deterministic=False)(draw_with_diffusers)
    return {DIFFUSERS: partial(pipe, pipeline, seeds, steps, batch_size), **drawn}


@click.command()
@click.option("--model", type=Path, default=MODEL, help="Model folder.")
@click.option("--num-images", type=click.IntRange(1), default=128, help="Images drawn per run.")
@click.option("--batch-size", type=click.IntRange(1), default=64, help="Images per batch.")
@click.option("--steps", type=click.IntRange(1, 1000), default=20, help="DDIM steps.")
@click.option(
    "--rounds", type=click.IntRange(1), default=5, help="Timed runs of each variant, in turn; the table shows medians."
)
@click.option(
    "--compiled/--no-compiled",
    default=True,
    help="Whether to time torch.compile too, which takes one or two minutes more.",
)
def main(model: Path, num_images: int, batch_size: int, steps: int, rounds: int, *, compiled: bool) -> None:
    """Draw the same images with every variant in turn, and compare speed and pixels with diffusers."""
    timed = variants(model, image_seeds(0, num_images), steps, batch_size, compiled=compiled)
    with warnings.catch_warnings(action="ignore"):  # the compiler warns about diffusers
        drawn = {name: draw_images() for name, draw_images in timed.items()}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, draw_images in timed.items():
            begin = time.perf_counter()
            draw_images()
            seconds[name].append(time.perf_counter() - begin)
    print("| variant | kernels | images per second | speed-up | differing pixels | largest difference |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name in timed:
        ratio = median(one / two for one, two in zip(seconds[DIFFUSERS], seconds[name], strict=True))
        differences = np.abs(drawn[name].astype(int) - drawn[DIFFUSERS])
        rate = num_images / median(seconds[name])
        setting = f"{name} | {'chosen for speed' if name == DIFFUSERS else 'deterministic'}"
        print(
            f"| {setting} | {rate:.1f} | {ratio:.2f}× | {(differences > 0).mean():.2%} | {differences.max()} of 255 |"
        )


if __name__ == "__main__":
    main()
