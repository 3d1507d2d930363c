"""A commit and overrides -> a workspace: a clone for one run, which shares DVC's cache with all others."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ruamel.yaml import YAML

from flows.workspaces.commands import Log
from flows.workspaces.dvc_config import write_local_config
from flows.workspaces.machine import machine_lock
from flows.workspaces.mending import mend
from flows.workspaces.overrides import Overrides
from flows.workspaces.repository import (
    HOME_VARIABLE,
    ParamsSource,
    Repository,
    hash_json,
    hash_overrides,
    locked,
)
from stages.params import load_params
from stages.runtime.environment import SHARED_VARIABLE
from stages.runtime.errors import InputError, first_line
from stages.runtime.git import git_output
from stages.runtime.schema import read_tree
from stages.runtime.stage_outputs import outputs
from stages.storage.files import write_atomically

LONGEST_MINUTES = 1_000_000
"""Highest limit of a stage: two years."""


@dataclass(frozen=True)
class Stage:
    """One entry of dvc.yaml."""

    name: str
    params: tuple[str, ...]
    needs: tuple[str, ...]
    """Names of the stages whose outputs it reads."""


@dataclass(frozen=True)
class Workspace:
    """The checkout in which one run works."""

    path: Path
    """Top folder of the checkout."""
    unsent: Path
    """Folder of records that wait for MLflow."""
    commit: str | None = None
    """Full hash; None for the user's own checkout, as it stands."""
    locks: Path | None = None
    """Folder of the locks that runs share; None in the user's own checkout, which DVC locks."""
    has_remote: bool = False
    """Whether DVC has a default remote."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables for every command in it, in addition to this process's."""

    @property
    def stages(self) -> list[Stage]:
        """Read the stages in the order of dvc.yaml.

        Raises:
            InputError: dvc.yaml is missing or lists no stages.
        """
        try:
            entries = read_tree(self.path / "dvc.yaml", YAML(typ="safe"))["stages"]
            makers = {out: name for name, entry in entries.items() for out in outputs(entry)}
            return [
                Stage(name, tuple(entry.get("params", [])), tuple(_needs(entry.get("deps", []), makers)))
                for name, entry in entries.items()
            ]
        except (InputError, AttributeError, KeyError, TypeError) as error:
            raise InputError(
                f"dvc.yaml here lists no stages ({first_line(error)}); run the flow at the top of the project"
            ) from None

    def keys(self) -> dict[str, str]:
        """Hash the commit, params and inputs of each stage; stages with equal keys have equal outputs."""
        params = load_params(self.path / "params.yaml").model_dump(mode="json")
        found: dict[str, str] = {}
        for stage in self.stages:
            chosen = [params[key] for key in stage.params]
            found[stage.name] = hash_json([self.commit, stage.name, chosen, [found[it] for it in stage.needs]])
        return found

    @property
    def machine(self) -> Path:
        """The lock file of all runs on this machine that share its folder."""
        return machine_lock(self.locks.parent if self.locks else None)

    def takes_times(self, stage: str) -> bool:
        """Whether a stage measures seconds, which hold only while no other run computes beside it.

        A training with snapshots does, unless several cells are to share this machine.
        """
        if stage == "prune":
            return load_params(self.path / "params.yaml").prune.target.latency_ms is not None
        if stage == "finetune":
            has_snapshots = bool(load_params(self.path / "params.yaml").finetune.snapshots)
            return has_snapshots and SHARED_VARIABLE not in self.environment
        return stage == "costs"

    def check_limits(self, limits: Mapping[str, float]) -> None:
        """Check that every key is a stage and every value a number of minutes.

        Raises:
            InputError: One is not.
        """
        names = [stage.name for stage in self.stages]
        for name, minutes in limits.items():
            if name not in names:
                raise InputError(f"limit {name}: no such stage; the stages are {', '.join(names)}")
            if isinstance(minutes, bool) or not isinstance(minutes, int | float) or not 0 < minutes <= LONGEST_MINUTES:
                raise InputError(f"limit {name}={minutes}: give minutes above 0 and at most {LONGEST_MINUTES}")

    @contextmanager
    def exclusive(self, key: str, log: Log) -> Iterator[None]:
        """Hold the lock of a stage's key, so that runs that share the folder of locks do equal work one at a time."""
        if self.locks is None:
            yield
            return
        with locked(self.locks / f"{key}.lock", log):
            yield

    def remove(self) -> None:
        """Remove the workspace, since the cache has its outputs; a user's own checkout stays."""
        if self.commit is not None:
            gone = self.path.with_name(f".{self.path.name}.gone")  # a kill meanwhile must not leave half a workspace
            shutil.rmtree(gone, ignore_errors=True)
            self.path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def _needs(deps: list[str], makers: Mapping[str, str]) -> Iterator[str]:
    """Name the stages whose outputs a stage reads; it may read one file of an output folder."""
    needed = {maker for dep in deps for out, maker in makers.items() if Path(dep).is_relative_to(out)}
    yield from (maker for maker in dict.fromkeys(makers.values()) if maker in needed)


def current_checkout() -> Workspace:
    """Return the current folder as a workspace, as it stands.

    Raises:
        InputError: It is not the top folder of a project.
    """
    load_params(Path("params.yaml"))
    workspace = Workspace(Path.cwd(), Path("unsent").resolve())
    workspace.stages  # noqa: B018  # raises where the folder is no project
    return workspace


@contextmanager
def open_workspace(
    commit: str,
    overrides: Overrides,
    log: Log,
    environment: Mapping[str, str] | None = None,
    preset: str | None = None,
) -> Iterator[Workspace]:
    """Clone a commit, write the overrides into its params.yaml, and lock the workspace while the block lasts.

    The same commit, preset and overrides have the same workspace, so a run that was killed goes on from its
    checkpoints.

    Args:
        commit: A branch, tag or hash.
        overrides: Changes to the commit's params.yaml.
        log: Called with lines for the log.
        environment: Environment variables for every command in it.
        preset: Name of a preset of the commit that replaces its params.yaml; None keeps it.

    Raises:
        InputError: The commit is not found, or the overrides are not allowed.
    """
    repository = Repository.find()
    found = repository.resolve(commit, log)
    (params,) = repository.render(ParamsSource(found, preset), [overrides])
    name = f"{found[:12]}-{hash_overrides(overrides, preset)}"
    path = repository.root / "workspaces" / name
    with locked(repository.root / "locks" / f"{name}.lock", log):
        if git_output(path, "--git-dir=.git", "rev-parse", "--verify", "HEAD") != found:
            repository.clone(found, path)
        mend(path, log)
        write_atomically(path / "params.yaml", params)
        yield Workspace(
            path,
            repository.root / "unsent",
            found,
            repository.root / "locks",
            has_remote=_configure(repository, path),
            environment=dict(environment or {}),
        )


def _configure(repository: Repository, path: Path) -> bool:
    """Point DVC to the shared cache and the repository's remotes; returns whether it has a default remote."""
    if not (path / ".dvc").is_dir():
        raise InputError("the commit has no .dvc folder; set DVC up first: dvc init")
    origin = Path(repository.origin).resolve() / ".dvc" if repository.is_local else None
    is_own = origin is None or os.environ.get(HOME_VARIABLE)
    return write_local_config(path / ".dvc", origin, repository.root / "cache" if is_own else None)
