"""dvc.yaml, dvc.lock, params and code -> which stages would run and why; nothing is run, hashed anew or locked."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML

from flows.workspaces.dvc_config import read_dvc_config
from stages.runtime.code_hash import STAGES, code_record
from stages.runtime.errors import InputError
from stages.runtime.schema import flatten, read_tree
from stages.runtime.stage_outputs import outputs
from stages.runtime.wording import first_names
from stages.storage.files import json_bytes

CODE = "artifacts/code"
"""Output of the stage that hashes the code of the others; what it would write is computed here."""
State = Literal["up to date", "in cache", "runs"]
Hashes = Mapping[str, str]
"""Path of an output -> its md5 as dvc.lock has it."""


@dataclass(frozen=True)
class StageStatus:
    """What `dvc repro` would do with a stage."""

    name: str
    state: State
    """in cache: DVC takes the outputs of an equal run from its cache."""
    reasons: tuple[str, ...] = ()
    """Why it is not up to date, in a few words each."""


@dataclass(frozen=True)
class Cache:
    """The cache of a DVC project, read without DVC, which would lock the project."""

    folder: Path

    @classmethod
    def of_project(cls, project: Path) -> "Cache":
        """Find the cache of a project: cache.dir of DVC's config, else .dvc/cache.

        Raises:
            InputError: A config cannot be read.
        """
        folder = project / ".dvc"
        return cls(Path(read_dvc_config(folder)["cache"].get("dir") or folder / "cache"))

    def holds(self, md5: str) -> bool:
        """Whether the cache has a file, or a folder and every file in it."""
        if not self._path(md5).is_file():
            return False
        return not md5.endswith(".dir") or all(self._path(entry["md5"]).is_file() for entry in self.entries(md5))

    def entries(self, md5: str) -> list[dict[str, str]]:
        """List the files of a folder in the cache: relpath and md5 of each; empty if it is not there."""
        path = self._path(md5)
        return json.loads(path.read_text()) if path.is_file() else []

    def find_run(self, description: Mapping[str, Any]) -> Hashes | None:
        """Find the outputs of an equal run that are still in the cache, the newest first, as DVC looks for them."""
        folder = self.folder / "runs" / _run_key(description)[:2] / _run_key(description)
        runs = sorted(folder.glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
        found: dict[str, str] = {}
        with suppress(InputError):  # DVC removes a damaged record
            found = out_hashes(read_tree(runs[0], YAML(typ="safe"))) if runs else {}
        return found if found and all(map(self.holds, found.values())) else None

    def _path(self, md5: str) -> Path:
        return self.folder / "files" / "md5" / md5[:2] / md5[2:]


def _run_key(description: Mapping[str, Any]) -> str:
    """Hash command, inputs, params and names of the outputs, as DVC names equal runs (dvc/stage/cache.py)."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def out_hashes(lock: Mapping[str, Any]) -> dict[str, str]:
    """Return the outputs of an entry of dvc.lock: path -> md5."""
    return {str(out["path"]): str(out["md5"]) for out in lock.get("outs", [])}


@dataclass
class _Project:
    """One pass over the stages of a project."""

    folder: Path
    params: Mapping[str, Any]
    in_place: bool
    cache: Cache
    known: dict[str, str] = field(default_factory=dict)
    """Outputs of the stages so far that need not run: path -> md5."""
    makers: dict[str, str] = field(default_factory=dict)
    """Outputs of the stages so far: path -> stage."""

    def status(self, name: str, entry: Mapping[str, Any], lock: Mapping[str, Any]) -> StageStatus:
        """Decide about one stage, after those that it depends on."""
        deps = {dep: self._hash(dep) for dep in sorted(entry.get("deps", []))}
        reasons = tuple(self._reasons(entry, lock, deps))
        found: Hashes | None = out_hashes(lock) if not reasons else None
        missing = list(self._missing(entry))
        if found is not None and missing and not all(map(self.cache.holds, found.values())):
            found, reasons = None, tuple(missing)
        if found is None and (equal := _describe(entry, deps, self.params)):
            found = self.cache.find_run(equal)
        self.makers |= dict.fromkeys(outputs(entry), name)
        self.known |= found or {}
        if found is None:
            return StageStatus(name, "runs", reasons or tuple(missing))
        return StageStatus(name, "in cache" if reasons or missing else "up to date", reasons or tuple(missing))

    def _hash(self, dep: str) -> str | None:
        """Return the md5 that a dependency will have; None where a stage has to run first."""
        path = Path(dep)
        if path.parent == Path(CODE):
            return _md5(json_bytes(code_record(path.stem)))
        if dep in self.known:
            return self.known[dep]
        for out, md5 in self.known.items():
            if path.is_relative_to(out):
                names = {entry["relpath"]: entry["md5"] for entry in self.cache.entries(md5)}
                place = self.folder / dep
                return names.get(path.relative_to(out).as_posix()) or (
                    _md5(place.read_bytes()) if self.in_place and place.is_file() else None
                )
        return None

    def _reasons(
        self, entry: Mapping[str, Any], lock: Mapping[str, Any], deps: Mapping[str, str | None]
    ) -> Iterator[str]:
        if not lock:
            yield "dvc.lock does not have it"
            return
        if _words(entry["cmd"]) != _words(lock["cmd"]):
            yield "the command changed"
        before = {dep["path"]: dep["md5"] for dep in lock.get("deps", [])}
        for dep, md5 in deps.items():
            if md5 is not None and md5 != before.get(dep):
                yield "the code changed" if dep.startswith(CODE) else f"{dep} changed"
        if makers := dict.fromkeys(self._maker(dep) for dep, md5 in deps.items() if md5 is None):
            yield f"needs {', '.join(sorted(makers))}"
        recorded = lock.get("params", {}).get("params.yaml", {})
        yield from _changed_keys(recorded, {key: self.params.get(key) for key in entry.get("params", [])})

    def _maker(self, dep: str) -> str:
        """Name what makes a dependency: a stage, or nothing but the file itself."""
        return next((name for out, name in self.makers.items() if Path(dep).is_relative_to(out)), dep)

    def _missing(self, entry: Mapping[str, Any]) -> Iterator[str]:
        """Name the outputs that are not there; a workspace begins without any."""
        for out in outputs(entry):
            if not self.in_place or not (self.folder / out).exists():
                yield f"{out} is missing" if self.in_place else "a workspace begins without outputs"
                return


def _words(command: str | list[str]) -> list[str]:
    """Split one command, or several; DVC keeps no line breaks."""
    return (command if isinstance(command, str) else "\n".join(command)).split()


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()  # DVC's name of a file


def _changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Name the first changed keys of the params, and how many more there are."""
    old, new = dict(flatten(before)), dict(flatten(now))
    changed = [key for key in {**old, **new} if old.get(key, ...) != new.get(key, ...)]
    if changed:
        yield f"{first_names(changed, 2)} changed"


def _describe(
    entry: Mapping[str, Any], deps: Mapping[str, str | None], params: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Describe a run as DVC does in its cache of runs; None where a dependency is not known yet."""
    if None in deps.values():
        return None
    chosen = {key: params[key] for key in entry.get("params", []) if key in params}
    return {
        "cmd": entry["cmd"],
        "deps": [{"path": dep, "hash": "md5", "md5": md5} for dep, md5 in deps.items()],
        **({"params": {"params.yaml": chosen}} if chosen else {}),
        "outs": sorted(outputs(entry)),
    }


def find_statuses(folder: Path, params: Mapping[str, Any], *, in_place: bool) -> list[StageStatus]:
    """Find out what `dvc repro` would do with each stage of a project, in the order of dvc.yaml.

    What a stage that runs will write is not known before, so every stage that reads it counts as running, too, although
    DVC leaves it out where the output turns out the same. Outputs that were edited by hand are not noticed.

    Args:
        folder: The top folder of the project; the code is that of this process.
        params: The content of params.yaml.
        in_place: Whether the stages run in this folder, whose outputs count; else in a workspace, which takes all
            outputs from the cache.

    Raises:
        InputError: dvc.yaml, dvc.lock or DVC's config cannot be read.
    """
    entries, locks = _stages(folder / "dvc.yaml"), _stages(folder / "dvc.lock")
    if not entries:
        raise InputError("this folder has no dvc.yaml with stages; run the command at the top of the project")
    project = _Project(folder, params, in_place, Cache.of_project(folder))
    return [_code_status(folder, in_place=in_place), *_statuses(project, entries, locks)]


def upstream(folder: Path, targets: Iterable[str]) -> set[str]:
    """Name some stages of dvc.yaml and all stages whose outputs they need, directly or indirectly."""
    entries = _stages(folder / "dvc.yaml")
    makers = {out: name for name, entry in entries.items() for out in outputs(entry)}
    found, waiting = set[str](), list(targets)
    while waiting:
        name = waiting.pop()
        if name not in found and name in entries:
            found.add(name)
            deps = [Path(dep) for dep in entries[name].get("deps", [])]
            waiting += [maker for out, maker in makers.items() if any(dep.is_relative_to(out) for dep in deps)]
    return found


def _stages(path: Path) -> dict[str, Any]:
    """Read the stages of dvc.yaml or dvc.lock; none where there is no such file, or nothing in it."""
    content = read_tree(path, YAML(typ="safe")) if path.is_file() else None
    stages = content.get("stages") if isinstance(content, dict) else None
    return stages if isinstance(stages, dict) else {}


def _statuses(project: _Project, entries: Mapping[str, Any], locks: Mapping[str, Any]) -> Iterator[StageStatus]:
    for name, entry in entries.items():
        if CODE not in outputs(entry):
            yield project.status(name, entry, locks.get(name, {}))


def _code_status(folder: Path, *, in_place: bool) -> StageStatus:
    """Compare the hashes of the code with those that the code stage wrote; it takes seconds."""
    places = {path.parent.name: folder / CODE / f"{path.parent.name}.json" for path in STAGES.glob("*/__main__.py")}
    changed = [
        name
        for name, place in places.items()
        if not in_place or not place.is_file() or place.read_bytes() != json_bytes(code_record(name))
    ]
    why = ("the code changed" if in_place else "a workspace begins without outputs",) if changed else ()
    return StageStatus("code", "runs" if changed else "up to date", why)
