"""What runs share on one machine: the repository that they are cloned from, and the folder of workspaces and locks."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from ruamel.yaml import YAML

from flows.workspaces.overrides import Overrides, apply
from stages.params import Params
from stages.runtime.errors import InputError, UnavailableError, without_password
from stages.runtime.git import git_error, git_output

REPOSITORY_VARIABLE = "ESPALIER_REPOSITORY"
"""Of the environment: what runs are cloned from, a folder or an address; without it the folder we are in."""
HOME_VARIABLE = "ESPALIER_HOME"
"""Of the environment: where workspaces, locks, sweeps and unsent records lie; else .espalier in the repository."""
PRESETS = "recipes/presets"
"""Of a commit: whole params files, which a run may take in place of params.yaml."""
NAMES_TOLD = 3
Log = Callable[[str], None]
"""Takes a line for the log."""


@dataclass(frozen=True)
class Base:
    """What the overrides of cells change."""

    commit: str
    """Its hash."""
    preset: str | None = None
    """None is the commit's params.yaml."""


@dataclass(frozen=True)
class Repository:
    """Where runs of one repository live on this machine."""

    origin: str
    root: Path

    @classmethod
    def find(cls) -> "Repository":
        """Read the environment, and let this process and all that it starts keep one record in MLflow.

        Raises:
            InputError: The repository is elsewhere, and no folder is named.
        """
        origin, root = os.environ.get(REPOSITORY_VARIABLE) or str(Path.cwd()), os.environ.get(HOME_VARIABLE)
        if not root and not Path(origin).is_dir():
            place = without_password(origin)
            raise InputError(
                f"{REPOSITORY_VARIABLE} is {place}, no folder here; set {HOME_VARIABLE} to one for workspaces and cache"
            )
        repository = cls(origin, Path(root).resolve() if root else Path(origin).resolve() / ".espalier")
        make_folder(repository.root / "locks")
        os.environ["MLFLOW_TRACKING_URI"] = repository._tracking_uri()
        return repository

    @property
    def is_local(self) -> bool:
        """Whether runs are cloned from a folder of this machine."""
        return Path(self.origin).is_dir()

    @property
    def source(self) -> Path:
        """The folder to clone from: the repository, or its mirror."""
        return Path(self.origin).resolve() if self.is_local else self.root / "mirrors" / hash_json(self.origin)

    def _tracking_uri(self) -> str:
        """Give MLflow's address for those who work elsewhere, too: a relative file would be another one there."""
        uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
        relative = re.fullmatch(r"sqlite:///([^/].*)", uri)
        base = Path(self.origin).resolve() if self.is_local and not os.environ.get(HOME_VARIABLE) else self.root
        return f"sqlite:///{base / relative[1]}" if relative else uri

    def resolve(self, commit: str, log: Log) -> str:
        """Find the hash of a branch, tag or hash in the repository as it is now.

        Raises:
            InputError: There is none.
            UnavailableError: The repository does not answer.
        """
        if not self.is_local:
            self._mirror(log)
        found = (
            None if commit.startswith("-") else git_output(self.source, "rev-parse", "--verify", f"{commit}^{{commit}}")
        )
        if not found:
            place = without_password(self.origin)
            complaint = git_error(self.source, "rev-parse", "--git-dir")  # such as that it belongs to another user
            why = f" ({complaint})" if complaint else ""
            raise InputError(f"{place} has no commit {commit!r}{why}; give a branch, tag or hash of it")
        if self.is_local and commit == "HEAD":
            self._warn(found, log)
        return found

    def render(self, commit: str, cells: Iterable[Overrides], preset: str | None = None) -> list[bytes]:
        """Give the params of a commit, its params.yaml or a preset, with each cell's overrides, and clone nothing.

        Raises:
            InputError: The commit has none, or an override is not allowed.
        """
        name, params = self._base(commit, preset)
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / name
            path.write_text(f"{params}\n")
            return [apply(overrides, path) for overrides in cells]

    def params(self, commit: str, preset: str | None = None) -> Params:
        """Read the params of a commit, its params.yaml or a preset.

        Raises:
            InputError: The commit has none, or a value is not allowed.
        """
        (text,) = self.render(commit, [{}], preset)
        return Params.model_validate(YAML(typ="safe").load(text.decode()))

    def _base(self, commit: str, preset: str | None) -> tuple[str, str]:
        """Find the params file that overrides change: its name and its text."""
        if preset is not None:
            listed = git_output(self.source, "ls-tree", "--name-only", f"{commit}:{PRESETS}") or ""
            known = [name.removesuffix(".yaml") for name in listed.splitlines() if name.endswith(".yaml")]
            if preset not in known:
                found = f"commit {commit[:12]} has no preset {preset!r}"
                raise InputError(f"{found}; it has {', '.join(known)}" if known else f"{found}, nor any other")
        path = "params.yaml" if preset is None else f"{PRESETS}/{preset}.yaml"
        text = git_output(self.source, "show", f"{commit}:{path}")
        if text is None:
            raise InputError(f"commit {commit[:12]} has no params.yaml; give a commit of this project")
        return Path(path).name, text

    def clone(self, commit: str, path: Path) -> None:
        """Clone a commit, whole or not at all; whatever of it was there by halves goes.

        Raises:
            InputError: git cannot.
        """
        make_folder(path.parent)
        for torn in [path, *path.parent.glob(f".{path.name}.*")]:
            shutil.rmtree(torn, ignore_errors=True)
        origin = git_output(self.source, "config", "--get", "remote.origin.url")
        with _renamed(path) as temporary:
            for place, command in (
                (None, ["clone", "--quiet", "--no-checkout", "--", str(self.source), str(temporary)]),
                (temporary, ["checkout", "--quiet", "--detach", commit]),
                # Where a version can be had from is told by the repository's own remote, not by a folder of here.
                (temporary, ["remote", *(["set-url", "origin", origin] if origin else ["remove", "origin"])]),
            ):
                if complaint := git_error(place, *command):
                    repository = without_password(self.origin)
                    raise InputError(f"no workspace for {commit[:12]} of {repository}: {complaint}")

    def _mirror(self, log: Log) -> None:
        """Bring the mirror of the repository up to date."""
        make_folder(self.source.parent)
        with locked(self.source.with_suffix(".lock"), log):
            if self.source.is_dir():
                complaint = git_error(self.source, "remote", "update", "--prune")
            else:
                temporary = Path(tempfile.mkdtemp(dir=self.source.parent))
                complaint = git_error(None, "clone", "--quiet", "--mirror", "--", self.origin, str(temporary))
                if complaint:
                    shutil.rmtree(temporary)
                else:
                    temporary.rename(self.source)
        if complaint:
            raise UnavailableError(f"{without_password(self.origin)} cannot be cloned: {complaint}")

    def _warn(self, found: str, log: Log) -> None:
        """Say where a checkout holds what its commit does not."""
        changed = git_output(self.source, "status", "--porcelain", "--untracked-files=no")
        names = [line[3:] for line in (changed or "").splitlines()]
        if names:
            more = f" and {len(names) - NAMES_TOLD} more" if len(names) > NAMES_TOLD else ""
            some = f"{', '.join(names[:NAMES_TOLD])}{more}"
            log(f"Warning: this run takes commit {found[:12]}, since which {some} changed")


def hash_overrides(overrides: Overrides, preset: str | None = None) -> str:
    """Name overrides, in whatever order, of params.yaml or of a preset."""
    return hash_json(dict(overrides) if preset is None else [preset, dict(overrides)])[:12]


def hash_json(content: Any) -> str:  # noqa: ANN401  # whatever JSON takes
    """Name a value by its content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def locked(path: Path, log: Log) -> Iterator[None]:
    """Keep other processes out; the lock dies with its owner."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        log(f"waiting for another run, which is at the same work ({path.stem[:25]})")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises:
        InputError: The place cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be made ({error.strerror}); set {HOME_VARIABLE} to a folder that can"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be written (Permission denied); set {HOME_VARIABLE} to a folder that can")


@contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `path` when the block ends well, and vanishes when it does not."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
