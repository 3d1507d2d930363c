"""UNets -> the time of one forward pass of each on this device."""

import time
from collections.abc import Mapping
from statistics import median

import torch

from stages.diffusion.families import Denoiser, example_inputs

WARM_UP = 5


@torch.inference_mode()
def measure_latencies_ms(models: Mapping[str, Denoiser], repeats: int) -> dict[str, float]:
    """Time a forward pass of one image, in milliseconds: the median of `repeats` after a warm-up.

    The models take turns, so that a slow moment of the machine falls on all of them alike.
    """
    times_ms = [{name: _time_ms(unet) for name, unet in models.items()} for _ in range(WARM_UP + repeats)]
    return {name: median(round_ms[name] for round_ms in times_ms[WARM_UP:]) for name in models}


def _time_ms(unet: Denoiser) -> float:
    inputs = example_inputs(unet)
    _wait(unet.device)
    begin = time.perf_counter()
    unet(**inputs)
    _wait(unet.device)
    return (time.perf_counter() - begin) * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
