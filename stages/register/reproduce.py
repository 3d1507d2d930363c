"""A version -> its work done once more in an empty place, and a verdict: identical, equal or different."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from stages.models.layout import PLAN, WEIGHTS
from stages.protocol.evaluation import METRICS, EvaluationRecord, read_evaluation
from stages.register.ledger import who
from stages.register.lineage import DECISIVE, Lineage, hash_outputs, read_lineage, read_runs
from stages.register.package import check_files
from stages.register.registry import CONTENT, EVIDENCE, MODEL, OURS, Registry
from stages.runtime.errors import InputError, first_line, without_password
from stages.runtime.git import git_error, git_output, without_git_variables
from stages.storage.files import copy_file, file_sha256
from stages.storage.s3 import VARIABLE
from stages.storage.tensors import read_tensors
from stages.tracking.compression import stage_folders

PROVED = ("model_index.json", PLAN, "scheduler/scheduler_config.json", "unet/config.json", f"unet/{WEIGHTS}")
"""Files of the model that must come out again; its card tells of times, which do not."""


@dataclass(frozen=True)
class File:
    """A file that did not come out again."""

    path: str
    what: str
    is_numeric: bool
    """Whether only the values of its numbers may differ, and not what they are the values of."""


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
    num_files: int = 0
    """How many were compared."""
    files: list[File] = field(default_factory=list)
    metrics: list[Value] = field(default_factory=list)
    machine: list[str] = field(default_factory=list)
    """How the machine differs from the one of then."""
    hindrance: str = ""
    """Why nothing could be compared."""

    @property
    def verdict(self) -> Literal["identical", "equal within tolerance", "different"]:
        """Hash by hash, else metric by metric."""
        if self.hindrance or not all(file.is_numeric for file in self.files):
            return "different"
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
        InputError: The version or its commit cannot be had.
    """
    registry = Registry()
    version = registry.find(uri)
    with tempfile.TemporaryDirectory() as temporary:
        files = registry.download(version, Path(temporary))
        check_files(files, version.tags.get(CONTENT))
        lineage = read_lineage(files / EVIDENCE)
        place = _empty(workspace or Path(temporary) / "workspace")
        _clone(lineage, repository, place)
        copy_file(files / EVIDENCE / "params.yaml", place / "params.yaml")
        found = Reproduction(f"models:/{version.name}/{version.version}", hindrance=_run(place))
        if not found.hindrance:
            found = _compare(found.uri, files, lineage, place)
    about = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "by": who(), **asdict(found)}
    registry.tag(version, reproduced=found.verdict, reproduction=json.dumps(about))
    return found


def _empty(folder: Path) -> Path:
    try:
        free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    except OSError as error:
        raise InputError(f"{folder} cannot be looked into ({first_line(error)}); give another place") from None
    if not free:
        raise InputError(f"{folder} is not empty; give a place where nothing is")
    return folder


def _clone(lineage: Lineage, repository: str | None, place: Path) -> None:
    source = repository or _find_repository(lineage)
    for folder, command in (
        (None, ["clone", "--quiet", "--no-checkout", "--", source, str(place)]),
        (place, ["checkout", "--quiet", "--detach", lineage.git_commit]),
    ):
        if complaint := git_error(folder, *command):
            found = f"commit {lineage.git_commit[:12]} cannot be had from {source}: {complaint}"
            raise InputError(f"{without_password(found)}; name another with --repository")
    (place / "dvc.lock").unlink(missing_ok=True)  # it would tell DVC that there is nothing to do


def _find_repository(lineage: Lineage) -> str:
    if git_output(Path(), "cat-file", "-e", f"{lineage.git_commit}^{{commit}}") is not None:
        return str(Path.cwd())
    if lineage.git_remote:
        return lineage.git_remote
    raise InputError(f"this checkout has no commit {lineage.git_commit[:12]}; give one that has with --repository")


def _run(place: Path) -> str:
    """Run every stage anew, with a record of its own; say what stopped it, if anything did."""
    environment = {
        key: value for key, value in without_git_variables().items() if key != VARIABLE and key[:7] != "MLFLOW_"
    }
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{place.resolve()}/mlflow.db"
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "dvc", "repro", "--force", "--no-run-cache"]
    result = subprocess.run(command, cwd=place, env=environment, check=False)  # noqa: S603
    return "the pipeline did not run to its end" if result.returncode else ""


def _compare(uri: str, files: Path, lineage: Lineage, place: Path) -> Reproduction:
    folders = stage_folders(place / "artifacts", place / "reports")
    then, now = read_evaluation(files / EVIDENCE / "evaluation"), read_evaluation(folders["evaluate"])
    runs = read_runs(folders)
    released = place / "artifacts" / "released" / OURS
    found = Reproduction(
        uri=uri,
        num_files=len(lineage.outputs) + len(PROVED),
        files=[
            *_compare_outputs(lineage.outputs, hash_outputs(place)),
            *(file for name in PROVED if (file := _compare_files(name, files / MODEL / name, released / name))),
        ],
        machine=list(_machine(lineage.runs, runs)),
    )
    if then.protocol_id != now.protocol_id:
        hindrance = f"the protocol came out as {now.protocol_id}, not as {then.protocol_id}, so metrics do not compare"
        return replace(found, hindrance=hindrance)
    return replace(found, metrics=list(_compare_metrics(then, now)))


def _compare_outputs(expected: Mapping[str, str], found: Mapping[str, str]) -> Iterator[File]:
    for path, sha256 in expected.items():
        if path not in found:
            yield File(path, "not made", is_numeric=False)
        elif found[path] != sha256:
            yield File(path, "another hash", is_numeric=Path(path).suffix in DECISIVE)


def _compare_files(name: str, then: Path, now: Path) -> File | None:
    """Say how a file of the model differs; None where it is equal."""
    path = f"artifacts/released/{OURS}/{name}"
    if not now.is_file():
        return File(path, "not made", is_numeric=False)
    if file_sha256(then) == file_sha256(now):
        return None
    if then.suffix != ".safetensors":
        return File(path, "another content", is_numeric=False)
    old, new = read_tensors(then), read_tensors(now)
    if {key: it.shape for key, it in old.items()} != {key: it.shape for key, it in new.items()}:
        return File(path, "other tensors", is_numeric=False)
    off = {key: float((old[key].double() - new[key].double()).abs().max()) for key in old}
    worst = max(off, key=lambda key: off[key])
    what = f"{sum(it > 0 for it in off.values())} of {len(off)} tensors, most {worst} by {off[worst]:.2g}"
    return File(path, what, is_numeric=True)


def _compare_metrics(then: EvaluationRecord, now: EvaluationRecord) -> Iterator[Value]:
    for name in METRICS:
        old, new = (it.models[OURS].metric(name) for it in (then, now))
        yield Value(name, old.mean, new.mean, old.half_width or 0)


def _machine(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Name what differs between the machines of then and now, once."""
    seen: set[str] = set()
    for stage in now:
        old, new = (_describe(runs.get(stage, {})) for runs in (then, now))
        seen.update(f"{key} {old.get(key)}, now {new.get(key)}" for key in new if old.get(key) != new.get(key))
    yield from sorted(seen)


def _describe(run: Mapping[str, Any]) -> dict[str, Any]:
    device = (run.get("provenance") or {}).get("device", {})
    return {"python": run.get("python"), **run.get("packages", {}), **device}
