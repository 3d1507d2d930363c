"""A stage and its params -> run.json in what it writes, the provenance beside it, and the fingerprint of a training.

run.json holds the stage, its params and the versions of packages: equal work leaves an equal folder. With which code,
where, when and at which commit a stage ran stands in NAME.provenance.json beside its output folder NAME; DVC does not
track it.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from stages.runtime.code_hash import STAGES, hash_code
from stages.runtime.environment import KERNELS, WORKSPACE_VARIABLE
from stages.runtime.git import git_output
from stages.runtime.schema import Section
from stages.storage.files import RUN_RECORD, file_sha256, folder_sha256, read_json, write_json
from stages.storage.run_record import provenance_path

PACKAGES = ("diffusers", "numpy", "safetensors", "scikit-image", "torch", "torch-fidelity", "torch-pruning")
Params = Section | dict[str, Any] | int


def write_run_record(folder: Path, stage: str, **params: Params) -> None:
    """Write run.json into the output of a stage: its params and the versions of packages.

    It does not name the code, so that code which leaves the output as it was makes no later stage stale.
    """
    write_json(folder / RUN_RECORD, {"stage": stage, **_decisive(params)})


def write_provenance(folder: Path, **found: Any) -> None:  # noqa: ANN401  # any JSON
    """Write with which code, where, when and at which commit a stage wrote a folder, into a file beside it.

    Args:
        folder: The output, finished, with its run.json.
        found: What else varies from run to run, such as how long a training took.
    """
    began = psutil.Process().create_time()
    record = {
        "output_sha256": folder_sha256(folder),
        "code_sha256": hash_code(str(read_json(folder / RUN_RECORD)["stage"])),
        "git_commit": git_output(STAGES, "rev-parse", "--verify", "--quiet", "HEAD"),
        "git_dirty": bool(git_output(STAGES, "status", "--porcelain", "--", ".")),
        "device": _device(),
        "began_at": datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - began, 3),
        **found,
    }
    write_json(provenance_path(folder), record)


def fingerprint(stage: str, inputs: Iterable[Path], **params: Params) -> str:
    """Hash all that decides the outcome of a stage: code, params, inputs without their run.json, versions and device.

    The number of threads, the set of instructions and the variables that choose kernels decide the order of sums on a
    CPU and count only there; on a GPU the workspace of cuBLAS does.
    """
    device = _device()
    if device["cuda"]:
        del device["threads"]
    digest = hashlib.sha256(json.dumps([hash_code(stage), _decisive(params), device], sort_keys=True).encode())
    for path in (path for folder in inputs for path in sorted(folder.rglob("*"))):
        if path.is_file() and path.name != RUN_RECORD:
            digest.update(file_sha256(path).encode())
    return digest.hexdigest()


def _decisive(params: dict[str, Params]) -> dict[str, Any]:
    return {
        "params": {key: it.model_dump(mode="json") if isinstance(it, Section) else it for key, it in params.items()},
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def _device() -> dict[str, Any]:
    import torch  # noqa: PLC0415  # heavy, and a record of decisive params needs none

    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else f"cpu {platform.machine()}"
    found = {"name": name, "cuda": cuda, "threads": torch.get_num_threads()}
    if cuda:
        return found | {"cublas_workspace": os.environ.get(WORKSPACE_VARIABLE, "")}
    kernels = " ".join(f"{name}={os.environ[name]}" for name in KERNELS if name in os.environ)
    return found | {"instructions": torch.backends.cpu.get_cpu_capability(), "kernels": kernels}
