"""The energy counters of this machine -> joules; where there is none that can be read, there is no number."""

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch

from stages.models.latency import synchronize

POWERCAP = Path("/sys/class/powercap")
"""Where Linux has the counters of RAPL, which processors of Intel and AMD have."""
ZONES = "intel-rapl:*"
MICRO, MILLI = 1e-6, 1e-3
ENERGY_S, ENERGY_TURNS = 0.5, 3
"""Shortest time of passes between two readings of an energy counter, which moves in steps of a millisecond or, on a
GPU, of a tenth of a second; and number of such times for each model, of which the median counts."""


class EnergyMeter(Protocol):
    """A counter of energy that only grows."""

    source: str
    """What is read, in words."""

    def joules(self) -> float:
        """Return the energy since the meter was opened, in joules.

        Raises:
            OSError: The counter can no longer be read.
        """
        ...


class RaplMeter:
    """The energy of all processor packages, by RAPL: cores, caches and memory controllers, whoever uses them.

    A counter begins anew after `max_energy_range_uj`, minutes apart at the earliest; each reading counts one such turn.

    Args:
        zones: The folders of the packages.

    Raises:
        OSError, ValueError: A counter cannot be read.
    """

    def __init__(self, zones: Sequence[Path]) -> None:
        self.zones = list(zones)
        self.ranges = [_read_number(zone / "max_energy_range_uj") for zone in self.zones]
        self.last = self._read()
        self.total_uj = 0
        self.source = f"RAPL, {len(self.zones)} package{'s' if len(self.zones) > 1 else ''}"

    def _read(self) -> list[int]:
        return [_read_number(zone / "energy_uj") for zone in self.zones]

    def joules(self) -> float:
        """Return the energy of all packages since the meter was opened, in joules."""
        now = self._read()
        for before, after, span in zip(self.last, now, self.ranges, strict=True):
            self.total_uj += after - before + (span if after < before else 0)
        self.last = now
        return self.total_uj * MICRO


class NvmlMeter:
    """The energy of one NVIDIA GPU and its memory, by NVML, since the driver was loaded.

    Args:
        nvml: The module pynvml, initialised.
        handle: The GPU.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:  # noqa: ANN401  # pynvml may not be there
        self.nvml, self.handle, self.source = nvml, handle, "NVML"
        self.first_mj = int(nvml.nvmlDeviceGetTotalEnergyConsumption(handle))

    def joules(self) -> float:
        """Return the energy of the GPU since the meter was opened, in joules."""
        try:
            now_mj = int(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle))
        except self.nvml.NVMLError as error:
            raise OSError(str(error)) from None
        return (now_mj - self.first_mj) * MILLI


def open_meter(device: torch.device, powercap: Path = POWERCAP) -> EnergyMeter | None:
    """Open the counter of the device that computes; None where the machine has none, or does not let us read it."""
    return _open_nvml(device) if device.type == "cuda" else open_rapl(powercap)


def open_rapl(powercap: Path = POWERCAP) -> RaplMeter | None:
    """Open the counters of all processor packages; None where there are none, or one of them cannot be read.

    Parts of a package, such as its cores, and what spans packages, such as psys, would count energy twice. Without one
    of several packages the sum would be too low.

    Args:
        powercap: The folder of the counters.
    """
    try:
        folders = sorted(folder for folder in powercap.glob(ZONES) if folder.name.count(":") == 1)
        zones = [folder for folder in folders if (folder / "name").read_text().startswith("package")]
        return RaplMeter(zones) if zones else None
    except (OSError, ValueError):
        return None


def _read_number(path: Path) -> int:
    return int(path.read_text())


def _open_nvml(device: torch.device) -> NvmlMeter | None:
    """Open the counter of a GPU, which PyTorch may number otherwise than NVML does, by its UUID."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        return NvmlMeter(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except Exception:  # noqa: BLE001  # no module, no driver, an older GPU: each fails in its own way
        return None


@torch.inference_mode()
def measure_joules(
    runs: Mapping[str, Callable[[], object]], device: torch.device, meter: EnergyMeter
) -> dict[str, float] | None:
    """Measure the energy of one call of each function in joules: the median of several times, taken in turns.

    Returns:
        None where the counter could no longer be read, or did not move.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    try:
        for _ in range(ENERGY_TURNS):
            for name, run in runs.items():
                found[name].append(_joules_a_call(run, device, meter))
    except OSError:
        return None
    typical = {name: median(values) for name, values in found.items()}
    return typical if all(value > 0 for value in typical.values()) else None


def _joules_a_call(run: Callable[[], object], device: torch.device, meter: EnergyMeter) -> float:
    """Call a function for as long as ENERGY_S and divide the energy by the number of calls."""
    synchronize(device)
    begin, before, calls = time.perf_counter(), meter.joules(), 0
    while time.perf_counter() - begin < ENERGY_S:
        run()
        synchronize(device)
        calls += 1
    return (meter.joules() - before) / calls
