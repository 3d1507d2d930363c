"""A version -> its work done once more in an empty place, and a verdict: identical, equal or different."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from stages.artifacts import PLAN, RUN_RECORD, WEIGHTS, copy_file, file_sha256, read_json, read_tensors, stage_homes
from stages.errors import InputError
from stages.protocol.record import METRICS, read_record
from stages.register.gate import OURS
from stages.register.lineage import Lineage, hash_outputs, read_lineage
from stages.register.package import check_files
from stages.register.registry import CONTENT_TAG, EVIDENCE, MODEL, Registry
from stages.storage import VARIABLE

PROVED = ("model_index.json", PLAN, "scheduler/scheduler_config.json", "unet/config.json", f"unet/{WEIGHTS}")
"""Files of the model that must come out again; its card tells of times, which do not."""


@dataclass(frozen=True)
class File:
    """A file that did not come out again."""

    path: str
    what: str


@dataclass(frozen=True)
class Value:
    """A metric of the model, then and now."""

    name: str
    then: float
    now: float
    allowed: float
    """How far off it may be: half the 95 % interval that it was recorded with."""

    @property
    def is_equal(self) -> bool:
        """Whether it came out within its interval."""
        return abs(self.now - self.then) <= self.allowed


@dataclass(frozen=True)
class Reproduction:
    """What came of running a version's work again."""

    uri: str
    num_files: int
    """How many were compared."""
    files: list[File]
    metrics: list[Value]
    machine: list[str]
    """How the machine differs from the one of then."""

    @property
    def verdict(self) -> Literal["identical", "equal within tolerance", "different"]:
        """Hash by hash, else metric by metric."""
        if not self.files and all(metric.now == metric.then for metric in self.metrics):
            return "identical"
        return "equal within tolerance" if all(metric.is_equal for metric in self.metrics) else "different"


def reproduce(uri: str, repository: str | None, workspace: Path | None) -> Reproduction:
    """Rebuild a version's commit, params and data, run everything without caches, compare, and tag the version.

    Args:
        uri: models:/NAME/3 or models:/NAME@champion.
        repository: Where to clone from; without it this checkout, or the version's own remote if it lacks the commit.
        workspace: An empty folder for the work, which stays; without it a temporary one.

    Raises:
        InputError: The version or its commit cannot be had, or the work cannot be done again.
    """
    registry = Registry()
    version = registry.find(uri)
    with tempfile.TemporaryDirectory() as temporary:
        files = registry.download(version, Path(temporary))
        check_files(files, version.tags.get(CONTENT_TAG))
        lineage = read_lineage(files / EVIDENCE)
        place = _empty(workspace or Path(temporary) / "workspace")
        _clone(lineage, repository, place)
        copy_file(files / EVIDENCE / "params.yaml", place / "params.yaml")
        _run(place)
        found = _compare(f"models:/{version.name}/{version.version}", files, lineage, place)
    about = {"verdict": found.verdict, **asdict(found)}
    registry.tag(version, reproduced=found.verdict, reproduction=json.dumps(about))
    return found


def _empty(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty; give a place where nothing is")
    return folder


def _clone(lineage: Lineage, repository: str | None, place: Path) -> None:
    source = repository or _find_repository(lineage)
    for command in (
        ["clone", "--quiet", "--no-checkout", "--", source, str(place)],
        ["-C", str(place), "checkout", "--quiet", "--detach", lineage.git_commit],
    ):
        result = subprocess.run(["git", *command], capture_output=True, text=True, check=False)  # noqa: S603, S607
        if result.returncode:
            reason = " ".join(result.stderr.split()) or "git failed"
            raise InputError(f"commit {lineage.git_commit[:12]} cannot be had from {source}: {reason}")
    (place / "dvc.lock").unlink(missing_ok=True)  # it would tell DVC that there is nothing to do


def _find_repository(lineage: Lineage) -> str:
    command = ["git", "cat-file", "-e", f"{lineage.git_commit}^{{commit}}"]
    if subprocess.run(command, capture_output=True, check=False).returncode == 0:  # noqa: S603
        return str(Path.cwd())
    if lineage.git_remote:
        return lineage.git_remote
    raise InputError(f"this checkout has no commit {lineage.git_commit[:12]}; give one that has with --repository")


def _run(place: Path) -> None:
    """Run the whole pipeline, every stage anew; its record goes to a place of its own."""
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE and key[:7] != "MLFLOW_"}
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{place.resolve()}/mlflow.db"
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "dvc", "repro", "--force", "--no-run-cache"]
    result = subprocess.run(command, cwd=place, env=environment, check=False)  # noqa: S603
    if result.returncode:
        raise InputError("the pipeline did not run to its end; what stopped it stands above")


def _compare(uri: str, files: Path, lineage: Lineage, place: Path) -> Reproduction:
    outputs, released = hash_outputs(place), place / "artifacts" / "released" / OURS
    wrong = [
        *(
            File(path, "not made" if path not in outputs else "another hash")
            for path in _unlike(lineage.outputs, outputs)
        ),
        *(File(f"artifacts/released/{OURS}/{name}", _differ(files / MODEL / name, released / name)) for name in PROVED),
    ]
    homes = stage_homes(place / "artifacts", place / "reports")
    runs = {stage: read_json(home / RUN_RECORD) for stage, home in homes.items()}
    return Reproduction(
        uri=uri,
        num_files=len(lineage.outputs) + len(PROVED),
        files=[file for file in wrong if file.what],
        metrics=list(_measure(files, homes["evaluate"])),
        machine=list(_machine(lineage.runs, runs)),
    )


def _unlike(expected: Mapping[str, str], found: Mapping[str, str]) -> Iterator[str]:
    return (path for path, sha256 in expected.items() if found.get(path) != sha256)


def _differ(then: Path, now: Path) -> str:
    """Say how two files differ; nothing where they are equal."""
    if file_sha256(then) == file_sha256(now):
        return ""
    if then.suffix != ".safetensors":
        return "another content"
    old, new = read_tensors(then), read_tensors(now)
    if {name: it.shape for name, it in old.items()} != {name: it.shape for name, it in new.items()}:
        return "other tensors"
    off = {name: float((old[name].double() - new[name].double()).abs().max()) for name in old}
    worst = max(off, key=lambda name: off[name])
    return f"{sum(it > 0 for it in off.values())} of {len(off)} tensors, most {worst} by {off[worst]:.2g}"


def _measure(files: Path, evaluated: Path) -> Iterator[Value]:
    """Compare the metrics, which must come from one protocol."""
    then, now = read_record(files / EVIDENCE / "evaluation"), read_record(evaluated)
    if then.protocol_id != now.protocol_id:
        raise InputError(f"the protocol came out as {now.protocol_id}, not as {then.protocol_id}: other data or code")
    for name in METRICS:
        old, new = (it.models[OURS].metric(name) for it in (then, now))
        yield Value(name, old.mean, new.mean, old.half_width or 0)


def _machine(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Name what differs between the machines of then and now, once."""
    seen: set[str] = set()
    for stage in then:
        old, new = ({"python": run["python"], **run["packages"], **run["device"]} for run in (then[stage], now[stage]))
        seen.update(f"{key} {old.get(key)}, now {new.get(key)}" for key in new if old.get(key) != new.get(key))
    yield from sorted(seen)
