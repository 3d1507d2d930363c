"""Models or other callables -> their running times on this device."""

import functools
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

from stages.models.families import Denoiser, example_inputs, forward
from stages.runtime.device import kernels

WARM_UP = 5
SETTING = "batch 1, float32, eager, kernels chosen for speed"
"""How `measure_latencies_ms` measures."""


@torch.inference_mode()
def measure_latencies_ms(models: Mapping[str, Denoiser], repeats: int) -> dict[str, float]:
    """Measure a forward pass of one image in milliseconds: the median of `repeats` passes after a warm-up.

    The models run in turn, so that a slow phase of the machine affects all of them alike, and with the kernels that
    PyTorch chooses for speed, as for whoever draws with the released model.
    """
    runs = {name: forward_pass(unet) for name, unet in models.items()}
    device = next(iter(models.values())).device
    with kernels(deterministic=False):
        times_ms = time_in_turns(runs, device, repeats, warm_up=WARM_UP)
    return {name: median(times) for name, times in times_ms.items()}


class SteadyClock:
    """Measures models as if the machine kept the speed at which the dense model was measured first.

    Passes of model and dense model alternate, and the result is scaled by the change of the dense model's latency, to
    compensate for other load on the machine. So all results of one clock compare with each other.

    Args:
        dense: The dense model.
        repeats: Timed passes of each.
    """

    def __init__(self, dense: Denoiser, repeats: int) -> None:
        self.dense, self.repeats = dense, repeats

    @functools.cached_property
    def dense_ms(self) -> float:
        """Median latency of a forward pass of one image in the dense model, measured once."""
        return measure_latencies_ms({"dense": self.dense}, self.repeats)["dense"]

    def measure_ms(self, unet: Denoiser) -> float:
        """Measure the median latency of a forward pass of one image, in milliseconds."""
        dense_ms = self.dense_ms
        times_ms = measure_latencies_ms({"dense": self.dense, "model": unet}, self.repeats)
        return times_ms["model"] * dense_ms / times_ms["dense"]


def forward_pass(unet: Denoiser, batch_size: int = 1) -> Callable[[], object]:
    """Return a function that runs one forward pass on zeros in the model's precision."""
    inputs = {
        name: value.to(unet.dtype) if value.is_floating_point() else value
        for name, value in example_inputs(unet, batch_size).items()
    }
    return lambda: forward(unet, inputs)


def time_in_turns(
    runs: Mapping[str, Callable[[], object]], device: torch.device, repeats: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Run all functions in turn `warm_up + repeats` times; returns the milliseconds of each run after the warm-up."""
    rounds = [{name: _time_ms(run, device) for name, run in runs.items()} for _ in range(warm_up + repeats)]
    return {name: [times_ms[name] for times_ms in rounds[warm_up:]] for name in runs}


def _time_ms(run: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return (time.perf_counter() - begin) * 1e3


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize()
