"""The work of each stage and the seconds of each kind of pass -> seconds, disk and memory of each stage."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from stages.params import Params
from stages.tools.planning.costs_seconds import costs_seconds
from stages.tools.planning.workload import BYTES, ModelSize, Pass, Work, pass_macs

FLOPS_PER_MAC = 2
LIGHT, HEAVY = 0.4, 1.8
"""Shares of the time that a stage takes to start: of one that does not import PyTorch, and of the report, which imports
matplotlib and MLflow as well and draws figures (measured: 6 s and 10 s, 14 s and 27 s)."""
DISK_BYTES_PER_S = 5e8
"""Weights that are read or written a second, with their hash, where nothing is timed: an assumption."""
SHARED = ("reference", "importance", "finetune", "evaluate")
"""The stages whose work the GPUs of a machine share."""


@dataclass(frozen=True)
class Rates:
    """What the passes take on a device."""

    seconds: Mapping[Pass, float]
    """Of one image in a batch as large as the stage's, for each kind of pass that was measured."""
    startup_s: float = 0.0
    """Seconds of a stage before it computes: Python and its packages."""
    memory_bytes: Mapping[str, float] = field(default_factory=dict)
    """Stage -> peak memory."""


@dataclass(frozen=True)
class StageForecast:
    """What a stage is expected to take."""

    name: str
    work: Work
    seconds: float
    memory_bytes: float | None = None
    """Peak memory of its process, on the GPU if there is one; None where it was not estimated."""
    unmeasured: tuple[Pass, ...] = ()
    """Kinds of passes in it whose seconds are not known, and are left out."""


def forecast_stages(params: Params, works: Mapping[str, Work], rates: Rates, gpus: int = 1) -> list[StageForecast]:
    """Multiply the passes of each stage by their seconds.

    Args:
        params: All of params.yaml.
        works: The work of each stage.
        rates: What the passes take.
        gpus: GPUs that share the stages evenly that can be shared.
    """
    return [_forecast(name, params, work, rates, gpus if name in SHARED else 1) for name, work in works.items()]


def _forecast(name: str, params: Params, work: Work, rates: Rates, gpus: int) -> StageForecast:
    together, alone = (
        sum(number * rates.seconds.get(kind, 0.0) for kind, number in passes.items())
        for passes in (work.passes, work.alone)
    )
    seconds = alone + (together - alone) / gpus
    if name == "costs":
        seconds += costs_seconds(params, rates.seconds)
    unmeasured = tuple(kind for kind, number in work.passes.items() if number and kind not in rates.seconds)
    startup_s = rates.startup_s * _startup_share(name, params)
    return StageForecast(name, work, seconds + startup_s, rates.memory_bytes.get(name), unmeasured)


def _startup_share(name: str, params: Params) -> float:
    does_nothing = {"rounds": params.rounds.count == 1, "variants": params.variants is None}
    is_light = name == "code" or does_nothing.get(name, False)
    return LIGHT if is_light else HEAVY if name == "report" else 1.0


def rates_at(tflops: float, params: Params, size: ModelSize) -> Rates:
    """Return the rates of a device that sustains `tflops` · 10¹² operations per second in every pass of the UNets."""
    per_s = tflops * 1e12 / FLOPS_PER_MAC
    passes = {kind: macs / per_s for kind, macs in pass_macs(params, size).items()}
    weights: dict[Pass, float] = {"read": BYTES / DISK_BYTES_PER_S, "write": BYTES / DISK_BYTES_PER_S, "cut": 0.0}
    return Rates(passes | weights)
