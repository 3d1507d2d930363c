"""The workspaces of this machine -> what may be removed, since no run works in it and none may go on from it."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from flows.workspaces.checkout import find_stage
from flows.workspaces.repository import Repository, lock_errors, try_lock
from flows.workspaces.workspace import Workspace
from stages.runtime.bounded import parse_yaml
from stages.runtime.errors import InputError
from stages.tools.leftovers import FOLDER, ROUNDS, Leftover, Needed, held_trainings, measure, training_key


def find_workspaces(repository: Repository, needed: Needed) -> Iterator[Leftover]:
    """List the workspaces of a repository, and what interrupted clones and removals left beside them."""
    for path in sorted((repository.root / "workspaces").glob("*/")):
        name = path.name.strip(".").split(".")[0]  # .NAME.gone and .NAME.RANDOM belong to NAME
        size_bytes, modified = measure(path)
        with _reserved(repository, name, path) as is_free:
            training = _training(path)
        keep = needed.reason_to_keep(modified, training, is_held=not is_free)
        remove = partial(_remove, repository, name, path)
        yield Leftover("workspace", path.name, size_bytes, modified, "no run works in it", keep, remove)


def _training(workspace: Path) -> str | None:
    """Return what a workspace trains; "" if it holds nothing to go on from, None if its params are unreadable."""
    if not any(workspace.glob(f"{FOLDER}/*/step-*")) and not any(workspace.glob(f"{ROUNDS}/*/round-*")):
        return ""
    try:
        return training_key(parse_yaml((workspace / "params.yaml").read_text(), "params.yaml"))
    except (OSError, UnicodeDecodeError, InputError):
        return None


@contextmanager
def _reserved(repository: Repository, name: str, path: Path) -> Iterator[bool]:
    """Yield whether no run works in a workspace; while the block lasts, no flow begins to."""
    lock = repository.root / "locks" / f"{name}.lock"
    with ExitStack() as opened:
        with lock_errors(lock):
            is_own = _try(lock, opened)
        yield is_own and not held_trainings(path) and find_stage(str(path.resolve())) is None


def _try(lock: Path, opened: ExitStack) -> bool:
    """Take a lock until `opened` ends, if it is free; a file of another user, which cannot be opened, is not."""
    try:
        return try_lock(opened.enter_context(lock.open("a")))
    except PermissionError:
        return False


def _remove(repository: Repository, name: str, path: Path) -> bool:
    with _reserved(repository, name, path) as is_free:
        if is_free and path.name == name and path.exists():
            Workspace(path, repository.root / "unsent", commit=name).remove()
        elif is_free:
            shutil.rmtree(path, ignore_errors=True)
    return not path.exists()
