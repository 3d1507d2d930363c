"""Parts of the benchmark of a GPU -> their rows: latencies, importance, finetune and sampling."""

import itertools
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.finetune import Step, TrainingLoops
from benchmarks.gpu.bench import Bench, Rows, Variant, in_each_precision, product_speed, time_variants
from benchmarks.importance import draw_batch, plain_loop
from benchmarks.sampling import draw_with_diffusers
from stages.costs.params import CostsParams
from stages.costs.timing import measure_costs
from stages.data.images import Images, write_images
from stages.finetune.params import EngineParams
from stages.importance.measure import measure_importance
from stages.models.families import sample_shape
from stages.models.params import SamplerParams
from stages.models.pipeline import write_pipeline
from stages.models.sampling import cast_model, draw, image_seeds
from stages.protocol.costs import Cost
from stages.runtime.device import computing, kernels
from stages.runtime.progress import track
from stages.storage.tensors import tensors_sha256

SECONDS = 330
"""Seconds after which the table begins no other setting."""


def table(bench: Bench) -> Rows:
    """Time a forward pass of each system, dense and cut: eager passes of all, then compiled ones while time is left."""
    end, rows, pairs = time.monotonic() + SECONDS, [], {}
    each = list(itertools.product(bench.systems, bench.precisions))
    settings = [(*one, bench.sizes.batches, "eager") for one in each]
    if bench.compiled:
        settings += [(*one, (batch,), "compiled") for one in each for batch in bench.sizes.batches]
    for system, precision, batches, mode in track(settings, "table, setting", len(settings)):
        if time.monotonic() > end:
            reason = f"{SECONDS} s are over; run --part table --system {system} --precision {precision}"
            rows.append({"system": system, "batch": batches[0], "precision": precision, "mode": mode, "reason": reason})
            continue
        pairs[system] = pairs.get(system) or bench.pair(system)
        params = CostsParams(
            batches=batches, precisions=(precision,), compiled=mode == "compiled", repeats=bench.sizes.passes
        )
        rows += [_cost_row(system, cost) for cost in measure_costs(pairs[system], params) if cost.mode == mode]
    return rows


def _cost_row(system: str, cost: Cost) -> dict[str, Any]:
    row = cost.model_dump(exclude={"device", "peak_bytes", "left_out"})
    peak_mib = cost.peak_bytes / 2**20 if cost.peak_bytes else None
    return {"system": system, **row, "peak_mib": peak_mib, "reason": cost.left_out}


def importance(bench: Bench) -> Rows:
    """Time the measurement of importance against a bare loop over the same timesteps."""
    unet, scheduler = bench.dense(), DDPMScheduler()
    batch = draw_batch(bench.sizes.images, shape=sample_shape(unet), device=bench.device)
    timesteps, sha256 = range(0, 1000, bench.sizes.spacing), tensors_sha256(unet.state_dict())

    def bare(precision: str) -> None:
        """Measure by the bare loop."""
        with computing(precision), torch.autocast(bench.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            (losses,) = plain_loop(unet, scheduler, batch, timesteps, sha256).losses
        assert len(losses) == len(timesteps), "the bare loop ended early"

    def ours(precision: str, num_each: int) -> object:
        """Measure by the stage's function, so many timesteps in a pass."""
        how = {"criterion": "taylor", "formula": "paper", "timesteps_per_pass": num_each, "model_sha256": sha256}
        return measure_importance(unet, scheduler, [batch], timesteps, precision=precision, label=None, **how)

    def measure(precision: str) -> Rows:
        """Time all variants in one precision."""
        variants = [Variant("bare", kernels(deterministic=False)(partial(bare, precision)), deterministic=False)]
        for deterministic, num_each in itertools.product((True, False), (1, 4)):
            run = kernels(deterministic=deterministic)(partial(ours, precision, num_each))
            variants.append(Variant(f"ours, {num_each} a pass", run, deterministic))
        return time_variants(variants, bench, precision, "timesteps", len(timesteps))

    return in_each_precision(bench, measure)


def finetune(bench: Bench) -> Rows:
    """Time training steps of the cut model against a bare loop, and as shares of the speed of a large matrix product.

    The operations of a step are those that PyTorch counts in the bare loop's forward and backward pass.
    """
    unet, size = bench.pair()["pruned"], bench.sizes.images
    with tempfile.TemporaryDirectory() as name:
        model, data = (Path(name) / part for part in ("model", "data"))
        pixels = np.random.default_rng(0).integers(0, 256, (4 * size, *sample_shape(unet))).astype(np.uint8)
        write_pipeline(model, unet, DDPMScheduler())
        data.mkdir()
        write_images(data, Images(pixels, pixels[:1]), {})
        with FlopCounterMode(display=False) as counter:
            TrainingLoops(model, data, 1, bench.device).bare()()
        loops = TrainingLoops(model, data, size, bench.device)

        def measure(precision: str) -> Rows:
            """Time all variants in one precision."""
            peak = product_speed(bench, precision)
            rows = time_variants(
                _training_steps(loops, bench, precision), bench, precision, "images", bench.sizes.training_steps * size
            )
            for row in rows:
                if "images_per_s" in row:
                    share = row["images_per_s"] * counter.get_total_flops() / peak
                    row |= {"peak_tflops": peak / 1e12, "share_of_peak": share}
            return rows

        return in_each_precision(bench, measure)


def _training_steps(loops: TrainingLoops, bench: Bench, precision: str) -> list[Variant]:
    engines = {
        "ours": EngineParams(precision=precision),
        "ours, kernels for speed": EngineParams(precision=precision, deterministic=False),
    }
    if bench.compiled:
        engines["ours, compiled"] = EngineParams(precision=precision, deterministic=False, compile=True)
    steps = {"bare": loops.bare(precision), **{name: loops.ours(engine) for name, engine in engines.items()}}
    return [
        Variant(name, partial(_repeat, step, bench.sizes.training_steps), deterministic=name == "ours")
        for name, step in steps.items()
    ]


def _repeat(step: Step, num_steps: int) -> None:
    for _ in range(num_steps):
        step()


def sampling(bench: Bench) -> Rows:
    """Time the drawing of images against diffusers' own pipeline, which runs in the same precision and steps."""
    unet, size, steps = bench.dense(), bench.sizes.images, bench.sizes.sampler_steps
    scheduler, seeds = DDPMScheduler(), image_seeds(0, bench.sizes.images)

    def measure(precision: str) -> Rows:
        """Time all variants in one precision."""
        network = cast_model(unet, precision)
        pipeline = DDIMPipeline(network, DDIMScheduler.from_config(scheduler.config))
        pipeline.set_progress_bar_config(disable=True)
        theirs = computing(precision)(partial(draw_with_diffusers, pipeline, seeds, steps, size))
        ours = partial(draw, scheduler=scheduler, seeds=seeds, sampler=SamplerParams(steps=steps), batch_size=size)
        ours = partial(ours, precision=precision, label=precision)
        variants = {
            ("diffusers", False): theirs,
            ("ours", True): partial(ours, network),
            ("ours, kernels for speed", False): partial(ours, network),
        }
        if bench.compiled:
            variants["ours, compiled", False] = partial(ours, torch.compile(network, dynamic=False))
        timed = [
            Variant(name, kernels(deterministic=deterministic)(run), deterministic)
            for (name, deterministic), run in variants.items()
        ]
        return time_variants(timed, bench, precision, "images", size)

    return in_each_precision(bench, measure)
