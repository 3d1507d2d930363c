"""Variants and their models -> time, throughput and memory of a sampling step, each in the runtime that it is for."""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from stages.costs.params import PASSES, CostsParams
from stages.costs.timing import fill, leave_out, measure_once, time_runs, too_large
from stages.models.complexity import measure_peak_bytes
from stages.models.families import Denoiser, example_inputs
from stages.models.pipeline import unet_config
from stages.models.variants.cache import interval_of
from stages.models.variants.folder import read_variant, read_variant_record, variant_file, variant_folders
from stages.models.variants.graph import input_types
from stages.protocol.costs import Cost
from stages.runtime.device import cpu_name, device_name, kernels
from stages.runtime.progress import track
from stages.runtime.wording import count
from stages.storage.files import file_sha256

RUNTIME = "onnxruntime"
"""Mode of the rows of graphs."""
PEAK = """
import json, re, sys
import numpy, onnxruntime
def memory(key):
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(key + r":\\s+(\\d+) kB", file.read())[1])
given = json.load(sys.stdin)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = given["threads"]
inputs = {name: numpy.zeros(shape, kind) for name, (shape, kind) in given["inputs"].items()}
before = memory("VmRSS")
session = onnxruntime.InferenceSession(given["path"], options, providers=["CPUExecutionProvider"])
session.run(None, {each.name: inputs[each.name] for each in session.get_inputs()})
print(memory("VmHWM") - before)
"""
"""Program that prints its peak memory in bytes above what it had before it opened a graph and ran a pass.

VmHWM is that of the program alone; getrusage counts the process that started it, too, until it became this program."""


@dataclass(frozen=True)
class Candidate:
    """A model or variant that is timed."""

    unet: Denoiser
    sha256: str
    """Hash of the file with its weights or graph."""
    interval: int = 1
    graph: Path | None = None
    """The file of a graph; None for models that PyTorch runs."""

    def alike(self) -> tuple[str, int]:
        """Describe what decides the time of a pass: candidates with equal descriptions are timed once."""
        return (self.sha256 if self.graph else str(unet_config(self.unet))), self.interval


def read_candidates(
    models: Mapping[str, Denoiser], hashes: Mapping[str, str], folder: Path, device: torch.device
) -> dict[str, Candidate]:
    """Read the variants that a stage wrote, after the models that they were made from; empty if there are none.

    Rounds of passes in turn need all that are timed in memory. What is timed once, such as integers, which become the
    float32 of their model as they are read, is there once: equal candidates share the model of the first.
    """
    found = {name: Candidate(unet, hashes[name]) for name, unet in models.items()}
    first = {candidate.alike(): candidate.unet for candidate in reversed(found.values())}
    for path in variant_folders(folder):
        record, file = read_variant_record(path), variant_file(path)
        unet = read_variant(path, device)
        graph = file if record.kind.is_graph else None
        candidate = Candidate(unet, file_sha256(file), interval_of(unet), graph)
        found[record.name] = replace(candidate, unet=first.setdefault(candidate.alike(), unet))
    return found if len(found) > len(models) else {}


def measure_variants(candidates: Mapping[str, Candidate], params: CostsParams) -> list[Cost]:
    """Time all candidates in turn at each batch size, in float32; speed-ups are relative to the first.

    A candidate with a cache is timed over one full pass and those that reuse it, and the mean of them is its pass.
    """
    described = {name: candidate.alike() for name, candidate in candidates.items()}
    with kernels(deterministic=params.deterministic):
        return measure_once(candidates, described, lambda distinct: _measure_batches(distinct, params))


def _measure_batches(candidates: Mapping[str, Candidate], params: CostsParams) -> list[Cost]:
    rows: list[Cost] = []
    pace_ms = 0.0
    for batch in track(params.batches, "time variants, batch size", len(params.batches)):
        found = _measure(candidates, batch, pace_ms, params)
        cycles_ms = ((row.median_ms or 0.0) * candidates[row.model].interval for row in found)
        pace_ms = sum(cycles_ms) / batch or pace_ms
        rows += found
    return rows


def _measure(candidates: Mapping[str, Candidate], batch: int, pace_ms: float, params: CostsParams) -> list[Cost]:
    seconds = params.seconds * len(candidates)
    rows = {name: _row(name, candidate, batch, params) for name, candidate in candidates.items()}
    if PASSES * pace_ms * batch > seconds * 1e3:
        return leave_out(list(rows.values()), f"six passes would take more than {seconds:g} s")
    if reason := too_large(next(iter(candidates.values())).unet, batch):
        return leave_out(list(rows.values()), reason)
    try:
        return _time(rows, candidates, batch, params)
    except Exception as error:  # noqa: BLE001  # a runtime can fail in many ways, and a GPU run out of memory
        return leave_out(list(rows.values()), f"failed with {type(error).__name__}")


def _time(rows: Mapping[str, Cost], candidates: Mapping[str, Candidate], batch: int, params: CostsParams) -> list[Cost]:
    runs = {name: cycle(candidate, batch) for name, candidate in candidates.items()}
    device = next(iter(candidates.values())).unet.device
    cycles_ms = time_runs(runs, device, params, params.seconds * len(candidates))
    times_ms = {name: [time / candidates[name].interval for time in times] for name, times in cycles_ms.items()}
    reference_ms = next(iter(times_ms.values()))
    peaks = {name: partial(peak_bytes, candidate) for name, candidate in candidates.items()}
    return [fill(row, times_ms[name], reference_ms, peaks[name]) for name, row in rows.items()]


def _row(name: str, candidate: Candidate, batch: int, params: CostsParams) -> Cost:
    """Describe what is timed; a graph runs on the CPU whatever device the models are on."""
    on_cpu = f"{cpu_name()}, {count(torch.get_num_threads(), 'thread')}"
    return Cost(
        model=name,
        batch=batch,
        precision="float32",
        mode=RUNTIME if candidate.graph else "eager",
        device=on_cpu if candidate.graph else device_name(),
        deterministic=params.deterministic,
    )


def cycle(candidate: Candidate, batch: int) -> Callable[[], None]:
    """Return a function that runs one full pass and those that reuse it, at falling timesteps."""
    inputs = example_inputs(candidate.unet, batch)
    sample, timestep = inputs.pop("sample"), inputs.pop("timestep")
    steps = [timestep + index for index in reversed(range(candidate.interval))]

    @torch.inference_mode()
    def run() -> None:
        """Run them once."""
        for step in steps:
            candidate.unet(sample, timestep=step, **inputs)

    return run


def peak_bytes(candidate: Candidate, batch: int) -> int | None:
    """Measure the peak memory of a pass: as of any model, and of a graph the growth of a process that runs it.

    Returns:
        None where the process could not run.
    """
    if candidate.graph is None:
        return measure_peak_bytes(candidate.unet, batch)
    shapes, types = example_inputs(candidate.unet, batch), input_types(candidate.unet)
    inputs = {name: (list(shapes[name].shape), str(kind).removeprefix("torch.")) for name, kind in types.items()}
    given = {"path": str(candidate.graph), "threads": torch.get_num_threads(), "inputs": inputs}
    command = [sys.executable, "-I", "-c", PEAK]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, check=False)  # noqa: S603
    return None if done.returncode else int(done.stdout)
