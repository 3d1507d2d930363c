"""A device and sizes -> models with random weights there, and variants of the same work timed in turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.sizes import SYSTEMS, build, plan_random
from stages.models.families import Denoiser
from stages.models.latency import time_in_turns
from stages.models.sampling import DTYPES
from stages.prune.params import PruneParams
from stages.prune.surgery import cut
from stages.runtime.device import computing, has_tf32, kernels
from stages.runtime.errors import first_line
from stages.runtime.progress import track
from stages.storage.files import read_json

SYSTEM_NAMES = ("cifar10", "lsun-256", "imagenet-ldm")
"""Configs of the table; the other parts take the first."""
RATIO = PruneParams(target={"ratio": 0.3})
Rows = list[dict[str, Any]]
"""Of a table; `reason` says why a row has no times."""


@dataclass(frozen=True)
class Sizes:
    """How much is computed."""

    batches: tuple[int, ...] = (1, 16, 128)
    """Batch sizes of the table."""
    passes: int = 50
    """Largest number of timed passes of a row of the table."""
    images: int = 128
    """Images for calibration, of a training step, and drawn."""
    spacing: int = 50
    """Distance of the timesteps of importance."""
    sampler_steps: int = 50
    training_steps: int = 10
    """Steps of a timed run."""
    rounds: int = 3
    """Timed runs of each variant, in turn."""
    product: int = 8192
    """Rows of the matrices whose product shows the highest speed."""


FULL = Sizes()
TINY = Sizes(batches=(1, 2), passes=3, images=2, spacing=250, sampler_steps=2, training_steps=2, rounds=2, product=128)


@dataclass(frozen=True)
class Bench:
    """Where, with which models and how much is measured."""

    device: torch.device
    systems: Sequence[str] = SYSTEM_NAMES
    precisions: Sequence[str] = tuple(DTYPES)
    compiled: bool = True
    tiny: bool = False
    sizes: Sizes = FULL

    def dense(self, system: str = SYSTEM_NAMES[0]) -> Denoiser:
        """Build a system's model with random weights on the device."""
        return nn.Module.to(self._build(system), self.device)

    def pair(self, system: str = SYSTEM_NAMES[0]) -> dict[str, Denoiser]:
        """Build a system's model on the device, and a copy cut at ratio 0.3."""
        unet = self._build(system)
        pair = {"dense": unet, "pruned": cut(unet, plan_random(unet, RATIO))}
        return {name: nn.Module.to(model, self.device) for name, model in pair.items()}

    def _build(self, system: str) -> Denoiser:
        path = SYSTEMS / f"{system}.json"
        return build(path, **(shrunk(read_json(path)) if self.tiny else {}))


@dataclass(frozen=True)
class Variant:
    """One of several ways to do the same work."""

    name: str
    run: Callable[[], object]
    deterministic: bool


def shrunk(config: dict[str, Any]) -> dict[str, Any]:
    """Return what to change in a config so that a model of the same blocks computes in milliseconds."""
    num_blocks = len(config["block_out_channels"])
    changes = {"block_out_channels": (8,) * num_blocks, "layers_per_block": 1, "norm_num_groups": 2}
    width = {"cross_attention_dim": 8} if "cross_attention_dim" in config else {}
    return {**changes, **width, "sample_size": 2 ** (num_blocks - 1)}


def in_each_precision(bench: Bench, measure: Callable[[str], Rows]) -> Rows:
    """Collect the rows of each precision that the device has."""
    rows = []
    for precision in track(bench.precisions, "precision", len(bench.precisions)):
        is_lacking = precision == "tf32" and not has_tf32(bench.device)
        rows += [{"precision": precision, "reason": "this device has no tf32"}] if is_lacking else measure(precision)
    return rows


def time_variants(variants: Sequence[Variant], bench: Bench, precision: str, unit: str, count: float) -> Rows:
    """Time the variants in turn after a warm-up; one that fails gets its reason, the others go on.

    Args:
        variants: The first is what the others are compared with.
        bench: Device and number of rounds.
        precision: What the variants compute in, for the rows.
        unit: What a run makes.
        count: How many a run makes.
    """
    reasons = {variant.name: _try(variant, bench.device) for variant in variants}
    runs = {variant.name: variant.run for variant in variants if not reasons[variant.name]}
    times_ms = time_in_turns(runs, bench.device, bench.sizes.rounds, warm_up=0)
    rows = []
    for variant in variants:
        row = {"variant": variant.name, "precision": precision, "deterministic": variant.deterministic}
        if variant.name in times_ms:
            own_ms, first_ms = times_ms[variant.name], times_ms.get(variants[0].name)
            row |= {"median_ms": median(own_ms), f"{unit}_per_s": count / median(own_ms) * 1e3}
            row["speed_up"] = median(a / b for a, b in zip(first_ms, own_ms, strict=True)) if first_ms else None
        rows.append({**row, "reason": reasons[variant.name]})
    return rows


def _try(variant: Variant, device: torch.device) -> str:
    """Run a variant twice, which compiles it, and return why it fails; empty where it does not."""
    try:
        time_in_turns({variant.name: variant.run}, device, repeats=1)
    except Exception as error:  # noqa: BLE001  # a GPU runs out of memory, a compiler can fail in many ways
        return reason_of(error)
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return ""


def reason_of(error: Exception) -> str:
    """Return what stands in a row that failed."""
    return f"failed with {type(error).__name__}: {first_line(error)}"


def product_speed(bench: Bench, precision: str) -> float:
    """Measure the operations per second of a large matrix product: the fastest of ten."""
    size = bench.sizes.product
    one, two = torch.randn(2, size, size, device=bench.device, dtype=DTYPES[precision])
    with computing(precision), kernels(deterministic=False):
        times_ms = time_in_turns({"product": lambda: one @ two}, bench.device, repeats=10, warm_up=3)["product"]
    return 2 * size**3 / min(times_ms) * 1e3
