"""Models -> time, throughput and memory of a forward pass at several batch sizes, precisions and modes."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import median
from typing import TypeVar

import numpy as np
import psutil
import torch
from scipy.stats import bootstrap

from stages.costs.energy import measure_joules, open_meter
from stages.costs.params import PASSES, CostsParams
from stages.models.complexity import measure_peak_bytes, weights_bytes
from stages.models.families import Denoiser
from stages.models.latency import forward_pass, time_in_turns
from stages.models.pipeline import unet_config
from stages.models.sampling import cast_model
from stages.protocol.costs import Cost
from stages.runtime.device import computing, device_name, has_tf32, kernels
from stages.runtime.progress import track
from stages.runtime.wording import format_bytes

ENOUGH_PASSES = 20
"""Smallest number of passes for a 95th percentile."""
MEMORY_SHARE = 0.8
"""Share of the free memory that a pass may take."""
Timed = TypeVar("Timed")
"""What is timed: a model, or a variant of one."""
Runs = dict[str, Callable[[], object]]
"""Model -> a function that runs one pass of it."""


def measure_costs(models: Mapping[str, Denoiser], params: CostsParams) -> list[Cost]:
    """Time the models in turn in each setting that fits into time and memory; speed-ups are relative to the first.

    Models of equal widths compute the same and are timed once: they get the same rows.
    """
    descriptions = {name: str(unet_config(unet)) for name, unet in models.items()}
    with kernels(deterministic=params.deterministic):
        return measure_once(models, descriptions, lambda distinct: list(_measure(distinct, params)))


def measure_once(
    timed: Mapping[str, Timed], descriptions: Mapping[str, object], measure: Callable[[Mapping[str, Timed]], list[Cost]]
) -> list[Cost]:
    """Measure the first of those with equal descriptions, and give its rows to the others, too."""
    first = {text: name for name, text in reversed(list(descriptions.items()))}
    rows = measure({name: timed[name] for name in dict.fromkeys(first[text] for text in descriptions.values())})
    named = ((name, row) for name, text in descriptions.items() for row in rows if row.model == first[text])
    return [row.model_copy(update={"model": name}) for name, row in named]


def _measure(models: Mapping[str, Denoiser], params: CostsParams) -> Iterator[Cost]:
    cast, cast_for, pace_ms = {**models}, None, 0.0
    for precision, mode, batch in track(params.settings, "time passes, setting", len(params.settings)):
        if cast_for != (precision, mode):
            cast, cast_for, pace_ms = _cast(models, precision), (precision, mode), 0.0
        setting = {"batch": batch, "precision": precision, "mode": mode, "deterministic": params.deterministic}
        rows = [Cost(model=name, device=device_name(), **setting) for name in cast]
        try:
            with computing(precision), warnings.catch_warnings(action="ignore"):  # the compiler's, about diffusers
                rows = _time_rows(rows, cast, pace_ms, params)
        except Exception as error:  # noqa: BLE001  # a compiler can fail in many ways, and a GPU run out of memory
            rows = leave_out(rows, f"failed with {type(error).__name__}")
        yield from rows
        pace_ms = sum(row.median_ms or 0.0 for row in rows) / batch or pace_ms


def _cast(models: Mapping[str, Denoiser], precision: str) -> dict[str, Denoiser]:
    return {name: cast_model(unet, precision) for name, unet in models.items()}


def _time_rows(rows: list[Cost], models: Mapping[str, Denoiser], pace_ms: float, params: CostsParams) -> list[Cost]:
    """Fill the rows of one setting; the models are timed in turn, and their energy is read where there is a counter."""
    batch, mode = rows[0].batch, rows[0].mode
    if rows[0].precision == "tf32" and not has_tf32(next(iter(models.values())).device):
        return leave_out(rows, "this device has no tf32")
    if PASSES * pace_ms * batch > params.seconds * 1e3:
        return leave_out(rows, f"six passes would take more than {params.seconds:g} s")
    if reason := too_large(next(iter(models.values())), batch):
        return leave_out(rows, reason)
    runs = _prepare(models, batch, mode)
    device = next(iter(models.values())).device
    times_ms = time_runs(runs, device, params, params.seconds, warm_up=2 if mode == "compiled" else 1)
    reference_ms = next(iter(times_ms.values()))
    peaks = {name: partial(measure_peak_bytes, unet) for name, unet in models.items()}
    filled = [fill(row, times_ms[row.model], reference_ms, peaks[row.model]) for row in rows]
    if (meter := open_meter(device)) and (joules := measure_joules(runs, device, meter)):
        shares = {name: value / batch for name, value in joules.items()}
        changes = {name: {"joules_per_image": it, "energy_source": meter.source} for name, it in shares.items()}
        filled = [row.model_copy(update=changes[row.model]) for row in filled]
    return filled


def leave_out(rows: list[Cost], reason: str) -> list[Cost]:
    """Return rows without times, and the reason."""
    return [row.model_copy(update={"left_out": reason}) for row in rows]


def too_large(unet: Denoiser, batch: int) -> str:
    """Reason why a batch does not fit into memory, estimated from one image; empty where it fits."""
    weights = weights_bytes(unet)
    needed = weights + batch * (measure_peak_bytes(unet, 1) - weights)
    if unet.device.type == "cuda":
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        free = torch.cuda.mem_get_info()[0] + kept
    else:
        free = psutil.virtual_memory().available
    if needed <= MEMORY_SHARE * free:
        return ""
    return f"needs {format_bytes(needed)}, {format_bytes(free)} are free"


def _prepare(models: Mapping[str, Denoiser], batch: int, mode: str) -> Runs:
    """Return a function that runs one pass of each model."""
    runs: Runs = {name: forward_pass(unet, batch) for name, unet in models.items()}
    if mode == "compiled":
        torch.compiler.reset()
        runs = {name: torch.compile(run, dynamic=False) for name, run in runs.items()}
    return runs


@torch.inference_mode()
def time_runs(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    params: CostsParams,
    seconds: float,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Run all functions in turn as often as fits into the seconds; returns the milliseconds of each run."""
    tried = time_in_turns(runs, device, repeats=1, warm_up=warm_up)
    round_ms = sum(times[0] for times in tried.values())
    repeats = int(min(params.repeats, max(PASSES, seconds * 1e3 / round_ms)))
    return time_in_turns(runs, device, repeats)


def fill(row: Cost, times_ms: list[float], reference_ms: list[float], measure: Callable[[int], int | None]) -> Cost:
    """Fill a row with its times, and with the peak memory that a function measures of a batch size."""
    typical = median(times_ms)
    ratios = np.array(reference_ms) / times_ms
    low, high = _interval_of_median(ratios)
    found = {
        "passes": len(times_ms),
        "median_ms": typical,
        "p95_ms": float(np.percentile(times_ms, 95)) if len(times_ms) >= ENOUGH_PASSES else None,
        "images_per_s": row.batch / typical * 1e3,
        "speed_up": float(np.median(ratios)),
        "speed_up_low": low,
        "speed_up_high": high,
        "peak_bytes": None if row.mode == "compiled" else measure(row.batch),
    }
    return row.model_copy(update=found)


def _interval_of_median(values: np.ndarray) -> tuple[float, float]:
    if np.ptp(values) == 0:  # a model against itself
        return float(values[0]), float(values[0])
    found = bootstrap((values,), np.median, n_resamples=999, method="percentile", rng=np.random.default_rng(0))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
