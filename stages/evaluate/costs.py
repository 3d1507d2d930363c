"""Models -> the truth table of speed: time, throughput and memory at several batches, precisions and modes."""

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np
import psutil
import torch

from stages.diffusion.cost import measure_peak_bytes
from stages.diffusion.families import Denoiser
from stages.diffusion.latency import forward_pass, time_in_turns
from stages.diffusion.models import describe
from stages.diffusion.sampling import cast_model
from stages.errors import first_line
from stages.params import CostParams
from stages.progress import track

PASSES = 3
"""Timed at least."""
MEMORY_SHARE = 0.8
"""Of what is free, which a pass may take."""


@dataclass(frozen=True)
class Cost:
    """What a forward pass of one model costs in one setting; without times where it was left out."""

    model: str
    batch: int
    precision: str
    mode: str
    """eager or compiled."""
    device: str
    median_ms: float | None = None
    p95_ms: float | None = None
    images_per_s: float | None = None
    peak_bytes: int | None = None
    left_out: str = ""
    """Why there are no times."""


def measure_costs(models: Mapping[str, Denoiser], params: CostParams) -> list[Cost]:
    """Time the models in turn, in every setting that fits into time and memory.

    Models of equal widths compute the same, so they are timed once and share their rows.
    """
    first = {str(describe(unet)): name for name, unet in reversed(list(models.items()))}
    twins = {name: first[str(describe(unet))] for name, unet in models.items()}
    distinct = {name: models[name] for name in dict.fromkeys(twins.values())}
    rows = list(_measure(distinct, params))
    return [Cost(**{**vars(row), "model": name}) for name, twin in twins.items() for row in rows if row.model == twin]


def _measure(models: Mapping[str, Denoiser], params: CostParams) -> Iterator[Cost]:
    modes = ["eager", "compiled"] if params.compiled else ["eager"]
    settings = list(itertools.product(params.precisions, modes))
    for precision, mode in track(settings, "time passes, setting", len(settings)):
        cast = {name: cast_model(unet, precision) for name, unet in models.items()}
        pace_ms = 0.0
        for batch in params.batches:
            named: dict[str, object] = {"batch": batch, "precision": precision, "mode": mode, "device": _device_name()}
            reason = _why_not(cast, batch, pace_ms * batch, params.seconds)
            try:
                with warnings.catch_warnings(action="ignore"):  # of the compiler, about diffusers
                    times_ms = {} if reason else _time(cast, batch, mode, params)
            except Exception as error:  # noqa: BLE001  # a compiler can fail in many ways, and a GPU run out of memory
                times_ms, reason = {}, first_line(error)[:120]
            for name, unet in cast.items():
                yield _row(name, named, times_ms.get(name), reason, unet)
            if times_ms:
                pace_ms = max(median(times) for times in times_ms.values()) / batch


def _why_not(models: Mapping[str, Denoiser], batch: int, expected_ms: float, seconds: float) -> str:
    """Say why a batch is not to be tried, from the time of the batch before and the memory of a single image."""
    if PASSES * expected_ms > seconds * 1e3:
        return f"three passes would take more than {seconds:g} s"
    unet = next(iter(models.values()))
    needed = batch * measure_peak_bytes(unet, 1)
    free = torch.cuda.mem_get_info()[0] if unet.device.type == "cuda" else psutil.virtual_memory().available
    if needed > MEMORY_SHARE * free:
        return f"needs up to {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
    return ""


@torch.inference_mode()
def _time(models: Mapping[str, Denoiser], batch: int, mode: str, params: CostParams) -> dict[str, list[float]]:
    device = next(iter(models.values())).device
    runs: dict[str, Callable[[], object]] = {name: forward_pass(unet, batch) for name, unet in models.items()}
    if mode == "compiled":
        torch.compiler.reset()
        runs = {name: torch.compile(run, dynamic=False) for name, run in runs.items()}
    tried = time_in_turns(runs, device, repeats=1, warm_up=2 if mode == "compiled" else 1)
    round_ms = sum(times[0] for times in tried.values())
    repeats = int(min(params.repeats, max(PASSES, params.seconds * 1e3 / round_ms)))
    return time_in_turns(runs, device, repeats)


def _row(name: str, named: Mapping[str, object], times_ms: list[float] | None, reason: str, unet: Denoiser) -> Cost:
    if not times_ms:
        return Cost(name, **named, left_out=reason)  # type: ignore[arg-type]
    typical, batch = median(times_ms), int(str(named["batch"]))
    return Cost(
        name,
        **named,  # type: ignore[arg-type]
        median_ms=typical,
        p95_ms=float(np.percentile(times_ms, 95)),
        images_per_s=batch / typical * 1e3,
        peak_bytes=measure_peak_bytes(unet, batch) if named["mode"] == "eager" else None,
    )


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
