"""The repository that runs are cloned from, and the folder of this machine that holds their workspaces and locks."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from flows.workspaces.commands import Log, pause
from flows.workspaces.overrides import Overrides, apply
from stages.params import Params
from stages.runtime import environment
from stages.runtime.bounded import parse_yaml
from stages.runtime.errors import InputError, UnavailableError, without_password
from stages.runtime.git import git_error, git_output, without_user
from stages.runtime.origin import find_origin
from stages.runtime.presets import PRESETS
from stages.runtime.wording import first_names
from stages.storage.files import cannot_lock, make_private, write_atomically
from stages.tracking.mlflow_client import absolute_address

REPOSITORY_VARIABLE, HOME_VARIABLE = environment.REPOSITORY_VARIABLE, environment.HOME_VARIABLE
"""What is cloned, and the folder of workspaces, locks, sweeps, unsent records: by default .espalier of it."""
FULL_HASH = re.compile(r"[0-9a-f]{40}")
POLL_S = 0.1
MOST_NAMES = 3
"""Changed files that a warning names."""


@dataclass(frozen=True)
class ParamsSource:
    """The params file that overrides change: params.yaml or a preset of a commit."""

    commit: str
    """Full hash."""
    preset: str | None = None
    """Name in recipes/presets; None is params.yaml."""


@dataclass(frozen=True)
class Repository:
    """A git repository, and the folder that its runs share on this machine."""

    origin: str
    """Folder or address."""
    root: Path
    """Holds workspaces, locks, mirrors, sweeps and unsent records."""

    @classmethod
    def find(cls) -> "Repository":
        """Read the environment; sets MLFLOW_TRACKING_URI, so that this process and its children share one MLflow.

        Raises:
            InputError: The repository is an address, and no folder of this machine is named.
        """
        repository = cls(find_origin(), shared_folder())
        make_shared_folder(repository.root)
        make_folder(repository.root / "locks")
        os.environ["MLFLOW_TRACKING_URI"] = absolute_address()
        return repository

    @property
    def is_local(self) -> bool:
        """Whether the origin is a folder of this machine."""
        return Path(self.origin).is_dir()

    @property
    def clone_from(self) -> Path:
        """The folder to clone from: the origin, or its mirror."""
        return Path(self.origin).resolve() if self.is_local else self.root / "mirrors" / hash_json(self.origin)

    def resolve(self, commit: str, log: Log) -> str:
        """Return the full hash of a branch, tag or hash in the repository as it is now.

        A full hash that the mirror has is not looked up in the repository.

        Raises:
            InputError: The repository has no such commit.
            UnavailableError: The repository does not answer.
        """
        if not self.is_local and not (FULL_HASH.fullmatch(commit) and self._has(commit)):
            self._update_mirror(log)
        found = (
            None
            if commit.startswith("-")
            else git_output(self.clone_from, "rev-parse", "--verify", f"{commit}^{{commit}}")
        )
        if not found:
            place = without_password(self.origin)
            complaint = git_error(self.clone_from, "rev-parse", "--git-dir")  # such as a repository of another user
            why = f" ({complaint})" if complaint else ""
            raise InputError(f"{place} has no commit {commit!r}{why}; give a branch, tag or hash of it")
        if self.is_local and commit == "HEAD":
            self._warn_of_changes(found, log)
        return found

    def _has(self, commit: str) -> bool:
        return git_output(self.clone_from, "cat-file", "-e", f"{commit}^{{commit}}") is not None

    def render(self, source: ParamsSource, cells: Iterable[Overrides]) -> list[bytes]:
        """Return a params file with the overrides of each cell; nothing is cloned.

        Raises:
            InputError: The commit lacks the file, or an override is not allowed.
        """
        name, params = self._read_params(source)
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / name
            write_atomically(path, f"{params}\n".encode(errors="surrogateescape"))
            return [apply(overrides, path) for overrides in cells]

    def params(self, source: ParamsSource, overrides: Overrides | None = None) -> Params:
        """Read a params file, with overrides if there are some.

        Raises:
            InputError: The commit lacks the file, or a value is not allowed.
        """
        (text,) = self.render(source, [overrides or {}])
        return Params.model_validate(parse_yaml(text.decode(), "params.yaml"))

    def _read_params(self, source: ParamsSource) -> tuple[str, str]:
        """Read name and text of a params file."""
        commit, preset = source.commit, source.preset
        if preset is not None:
            listed = git_output(self.clone_from, "ls-tree", "--name-only", f"{commit}:{PRESETS}") or ""
            known = sorted(name.removesuffix(".yaml") for name in listed.splitlines() if name.endswith(".yaml"))
            if preset not in known:
                found = f"commit {commit[:12]} has no preset {preset!r}"
                raise InputError(f"{found}; it has {', '.join(known)}" if known else f"{found}, nor any other")
        path = "params.yaml" if preset is None else f"{PRESETS}/{preset}.yaml"
        text = git_output(self.clone_from, "show", f"{commit}:{path}")
        if text is None:
            raise InputError(f"commit {commit[:12]} has no params.yaml; give a commit of this project")
        return Path(path).name, text

    def clone(self, commit: str, path: Path) -> None:
        """Clone a commit, whole or not at all; remains of an interrupted clone are removed.

        Raises:
            InputError: git failed.
        """
        make_folder(path.parent)
        for old in [path, *path.parent.glob(f".{path.name}.*")]:
            shutil.rmtree(old, ignore_errors=True)
        origin = without_user(git_output(self.clone_from, "config", "--get", "remote.origin.url") or "")
        remote = ["set-url", "origin", origin] if origin else ["remove", "origin"]
        with _renamed(path) as temporary:
            for place, command in (
                (None, ["clone", "--quiet", "--no-checkout", "--", str(self.clone_from), str(temporary)]),
                (temporary, ["checkout", "--quiet", "--detach", commit]),
                # A version records the remote that it can be cloned from, not a folder of this machine.
                (temporary, ["remote", *remote]),
            ):
                if complaint := git_error(place, *command):
                    repository = without_password(self.origin)
                    raise InputError(f"no workspace for {commit[:12]} of {repository}: {complaint}")

    def _update_mirror(self, log: Log) -> None:
        """Clone the mirror of the repository, or bring it up to date."""
        make_folder(self.clone_from.parent)
        with locked(self.clone_from.with_suffix(".lock"), log):
            if self.clone_from.is_dir():
                complaint = (
                    git_error(self.clone_from, "remote", "set-url", "origin", without_user(self.origin))
                    or git_error(self.clone_from, "remote", "update", "--prune", address=self.origin)
                    or self._follow_head()
                )
            else:
                temporary = Path(tempfile.mkdtemp(dir=self.clone_from.parent))
                command = ("clone", "--quiet", "--mirror", "--", without_user(self.origin), str(temporary))
                complaint = git_error(None, *command, address=self.origin)
                if complaint:
                    shutil.rmtree(temporary)
                else:
                    temporary.rename(self.clone_from)
        if complaint:
            raise UnavailableError(f"{without_password(self.origin)} cannot be cloned: {complaint}")

    def _follow_head(self) -> str:
        """Set HEAD of the mirror to what HEAD of the repository is now; returns git's complaint, if any.

        An update changes branches and tags only: HEAD would stay what it was when the mirror was cloned.
        """
        question = ("ls-remote", "--symref", "origin", "HEAD")
        listed = git_output(self.clone_from, *question, address=self.origin)
        if listed is None:
            return git_error(self.clone_from, *question, address=self.origin) or "HEAD was not listed"
        if branch := re.match(r"ref: (refs/heads/\S+)\s+HEAD$", listed, re.MULTILINE):
            return git_error(self.clone_from, "symbolic-ref", "HEAD", branch[1])
        if not listed:  # the repository is empty
            return ""
        fetch = ("fetch", "--quiet", "origin", "HEAD")  # of no branch
        complaint = git_error(self.clone_from, *fetch, address=self.origin)
        return complaint or git_error(self.clone_from, "update-ref", "--no-deref", "HEAD", "FETCH_HEAD")

    def _warn_of_changes(self, found: str, log: Log) -> None:
        """Log a warning if the checkout has changes that are not committed."""
        changed = git_output(self.clone_from, "status", "--porcelain", "--untracked-files=no")
        names = [line[3:] for line in (changed or "").splitlines()]
        if names:
            some = first_names(names, MOST_NAMES)
            log(f"Warning: this run uses commit {found[:12]}, since which {some} changed")


def hash_overrides(overrides: Overrides, preset: str | None = None) -> str:
    """Hash overrides of params.yaml or of a preset, whatever their order; 12 hex digits."""
    return hash_json(dict(overrides) if preset is None else [preset, dict(overrides)])[:12]


def hash_json(content: Any) -> str:  # noqa: ANN401  # whatever JSON takes
    """Hash a value by its content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def locked(path: Path, log: Log) -> Iterator[None]:
    """Hold a lock file against processes that do the same work; the system releases it when this process ends.

    Raises:
        InputError: The file cannot be written or locked.
    """
    with lock_errors(path):
        file = hold_lock(path, log, "does the same work")
    with file:
        yield


@contextmanager
def lock_errors(path: Path) -> Iterator[None]:
    """Turn an error of the system, while a lock file is opened and locked, into one line that names the file.

    Raises:
        InputError: The file is another user's, or the file system has no locks.
    """
    try:
        yield
    except OSError as error:
        remedy = f"set {HOME_VARIABLE} to a folder of your own, on a file system that has locks"
        raise cannot_lock(path, error, remedy) from None


def hold_lock(path: Path, log: Log, what: str) -> IO[str]:
    """Wait for a lock file, and write this process's id into it; the lock lasts until the file is closed.

    Args:
        path: The lock file, which stays.
        log: Called with a line that names the process that is waited for.
        what: What the other process does, for the line.

    Raises:
        OSError: The file cannot be written or locked.
    """
    with ExitStack() as opened:
        file = opened.enter_context(path.open("a+"))
        if not try_lock(file):
            file.seek(0)
            log(f"waiting for another run that {what} (process {file.read().strip()}, {path.stem[:25]})")
            while not try_lock(file):  # a call that blocks could not be cancelled
                pause(POLL_S)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        opened.pop_all()
    return file


def try_lock(file: IO[str], how: int = fcntl.LOCK_EX) -> bool:
    """Take the lock of an open file, alone or with LOCK_SH beside others, if it is free; returns whether it did.

    Raises:
        OSError: The file system has no locks.
    """
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def make_folder(folder: Path) -> None:
    """Make a folder and its parents.

    Raises:
        InputError: It cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be made ({error.strerror}); set {HOME_VARIABLE} to a folder that can"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be written (Permission denied); set {HOME_VARIABLE} to a folder that can")


def shared_folder() -> Path:
    """Return the folder of workspaces and locks: ESPALIER_HOME, or else .espalier of the repository.

    Raises:
        InputError: The repository is an address, and no folder of this machine is named.
    """
    home = os.environ.get(HOME_VARIABLE)
    return Path(home).resolve() if home else Path(find_origin()).resolve() / ".espalier"


def make_shared_folder(root: Path) -> None:
    """Make the folder that runs share, closed to other users; not one that ESPALIER_HOME names and that exists.

    Raises:
        InputError: It cannot be made or written.
    """
    is_chosen = bool(os.environ.get(HOME_VARIABLE)) and os.path.exists(root)  # noqa: PTH110  # also if it is closed
    make_folder(root)
    if not is_chosen:
        make_private(root)


@contextmanager
def _renamed(path: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `path` when the block succeeds and is removed when it fails."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
