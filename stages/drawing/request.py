"""What a person asks for -> a job, and the numbers of the shards to draw in this call."""

import os
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from stages.drawing.job import Job
from stages.drawing.labels import Labels, read_labels
from stages.drawing.source import GRAPH, Source
from stages.runtime.errors import InputError

MAX_SHARDS = 1_000_000
"""Most shards of a job, each of which has a record that every call reads."""
BATCHES_PER_SHARD = 16
"""Size of a shard in batches, where nobody chooses one."""
PACKAGES = ("diffusers", "numpy", "pillow", "pyarrow", "torch")
"""Packages whose versions decide bytes; onnxruntime is added for a graph."""


@dataclass(frozen=True)
class Request:
    """The options of the command."""

    model: str
    """A folder, or models:/NAME/3 or models:/NAME@champion."""
    out: str
    """A folder or s3://BUCKET/PREFIX."""
    seeds: range
    format: Literal["parquet", "webdataset"]
    label: int | None = None
    labels_path: Path | None = None
    steps: int | None = None
    batch_size: int | None = None
    shard_size: int | None = None
    shards: range | None = None
    """Numbers of the shards to draw; None is all."""
    jobs: int | None = None
    params_path: Path | None = None
    check: bool = False
    """Only compare the finished shards with their hashes."""


def choose_labels(label: int | None, path: Path | None, seeds: range) -> Labels:
    """Return where the classes of images come from: one class, a file, or neither.

    Raises:
        InputError: Both are given, or the file does not fit the seeds.
    """
    if label is not None and path is not None:
        raise InputError("--label and --labels exclude each other; give one of them")
    if path is not None:
        return read_labels(path, seeds.start, len(seeds))
    return Labels(seeds.start, one=label, origin=f"--label {label}")


def make_job(request: Request, source: Source, labels: Labels) -> Job:
    """Return the job of a request.

    Raises:
        InputError: The folder holds no model, the shards do not consist of whole batches, or they are too many.
    """
    settings = source.settings.changed(request.steps, request.batch_size)
    batch_size = settings.batch_size
    shard_size = request.shard_size or BATCHES_PER_SHARD * batch_size
    if shard_size % batch_size:
        lower, upper = shard_size // batch_size * batch_size, -(-shard_size // batch_size) * batch_size
        found = f"--shard-size {shard_size} is not a multiple of the batch of {batch_size}"
        raise InputError(
            f"{found}; give {lower or upper} or {upper + batch_size * (lower == 0)}, or another --batch-size"
        )
    if (num_shards := -(-len(request.seeds) // shard_size)) > MAX_SHARDS:
        found = f"{num_shards} shards of {shard_size} images are too many, at most {MAX_SHARDS}"
        raise InputError(f"{found}; raise --shard-size, or give fewer seeds")
    files = source.hashes()
    is_graph = any(name.endswith(GRAPH) for name in files)  # ONNX Runtime runs it, on the CPU
    is_gpu = torch.cuda.is_available() and not is_graph
    packages = (*PACKAGES, "onnxruntime") if is_graph else PACKAGES
    return Job(
        model=source.name,
        files=files,
        first_seed=request.seeds.start,
        end_seed=request.seeds.stop,
        labels=labels.description,
        sampler=settings.sampler,
        guidance=settings.guidance,
        precision=settings.precision,
        batch_size=batch_size,
        shard_size=shard_size,
        format=request.format,
        device="cuda" if is_gpu else "cpu",
        threads=None if is_gpu else threads_of_worker(),
        packages={name: version(name).partition("+")[0] for name in packages},
    )


def choose_numbers(request: Request, job: Job) -> range:
    """Return the numbers of the shards to draw.

    Raises:
        InputError: The job has no such shards.
    """
    every, chosen = job.numbers(), request.shards
    if chosen is None:
        return every
    if chosen.start < every.start or chosen.stop > every.stop:
        found = f"--shards {chosen.start}:{chosen.stop}: the job has the shards {every.start}:{every.stop}"
        raise InputError(f"{found}, the last one excluded; give numbers among them")
    return chosen


def threads_of_worker() -> int:
    """Return the threads of a worker on a CPU: those of OMP_NUM_THREADS, else one, whatever the number of workers."""
    found = re.match(r"[1-9]\d{0,3}(?!\d)", os.environ.get("OMP_NUM_THREADS", ""))
    return int(found[0]) if found else 1


def parse_range(text: str, option: str) -> range:
    """Parse A:B, from A up to, but not with, B.

    Raises:
        InputError: It has another form, or is empty.
    """
    match = re.fullmatch(r"([0-9]{1,19}):([0-9]{1,19})", text)
    if not match or int(match[1]) >= int(match[2]) or int(match[2]) >= 2**63:
        raise InputError(f"{option} {text!r}: give A:B with A < B, such as 0:1000 for 0 to 999")
    return range(int(match[1]), int(match[2]))
