"""A stage, its params and its inputs -> the record and the hash of what made a folder."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from stages.runtime.schema import Section
from stages.storage.files import RUN_RECORD, file_sha256, write_json

PACKAGES = ("diffusers", "numpy", "safetensors", "scikit-image", "torch", "torch-fidelity", "torch-pruning")
STAGES_ROOT = Path(__file__).parent
ALSO = {"reference": ["protocol"], "evaluate": ["protocol"]}
"""Packages that only some stages share."""
DOORS = (
    "compare.py",
    "compression.py",
    "export.py",
    "live.py",
    "mlflow_server.py",
    "oneshot.py",
    "storage.py",
    "tracking.py",
)
"""Files beside the stages that decide nothing of what a stage computes."""


def write_run_record(folder: Path, stage: str, **params: Section | int | dict[str, Any]) -> None:
    """Write run.json: what made this folder (the params that the stage read, commit, code, versions, device).

    It holds no time of day, so the same work leaves the same folder.
    """
    record = {
        "stage": stage,
        "params": _plain(params),
        "git_commit": _git("rev-parse", "--verify", "--quiet", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--", str(STAGES_ROOT))),
        "code_sha256": code_sha256(stage),
        **_machine(),
    }
    write_json(folder / RUN_RECORD, record)


def fingerprint(stage: str, inputs: Iterable[Path], **params: Section | int) -> str:
    """Hash all that decides the outcome of a stage: code, params, inputs (but for their run.json), versions, device."""
    digest = hashlib.sha256(code_sha256(stage).encode())
    digest.update(json.dumps([_plain(params), _machine()]).encode())
    for path in (path for folder in inputs for path in sorted(folder.rglob("*"))):
        if path.is_file() and path.name != RUN_RECORD:
            digest.update(file_sha256(path).encode())
    return digest.hexdigest()


def _plain(params: Mapping[str, Section | int | dict[str, Any]]) -> dict[str, Any]:
    return {key: part.model_dump(mode="json") if isinstance(part, Section) else part for key, part in params.items()}


def code_sha256(stage: str) -> str:
    """Hash the code of a stage and all that the computing stages share; a changed line is another hash."""
    own = sorted(path for name in (stage, *ALSO.get(stage, ())) for path in (STAGES_ROOT / name).rglob("*.py"))
    doors = {STAGES_ROOT / name for name in DOORS}
    shared = sorted({*STAGES_ROOT.glob("*.py"), *(STAGES_ROOT / "diffusion").glob("*.py")} - doors)
    digest = hashlib.sha256()
    for path in own + shared:
        digest.update(path.relative_to(STAGES_ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _machine() -> dict[str, Any]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {platform.machine()}"
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "device": {"name": name, "threads": torch.get_num_threads()},
    }


def _git(*arguments: str) -> str | None:
    """Ask git about the checkout; None where there is none, or it has nothing to say."""
    try:
        result = subprocess.run(  # noqa: S603
            ["git", *arguments],  # noqa: S607
            cwd=STAGES_ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no git on this machine
        return None
    return result.stdout.strip() or None
