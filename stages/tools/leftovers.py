"""Checkpoints on disk and a store -> what may be removed, since nothing may need it any more."""

import itertools
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.finetune.checkpoint import TRAINING
from stages.finetune.checkpoint_upload import CHECKPOINTS
from stages.finetune.params import FinetuneParams
from stages.models.params import RoundsParams
from stages.params import load_params
from stages.runtime.bounded import parse_yaml
from stages.runtime.errors import InputError
from stages.runtime.git import git_output
from stages.runtime.seeds import derive_seed
from stages.storage.files import read_json
from stages.storage.in_use import reserved
from stages.storage.s3_bucket import Item
from stages.storage.s3_contents import Folder, StoreContents, UnfinishedUpload

IN_USE, YOUNG, CURRENT, UNKNOWN = "in use", "too young", "of current params", "of unknown params"
"""Reasons to keep something."""
FOLDER, ROUNDS = Path("checkpoints/finetune"), Path("checkpoints/rounds")
"""Where dvc.yaml keeps the checkpoints, and the rounds before the last, of a checkout."""
SUMS = Path("checkpoints/importance")
"""Where the stage importance keeps its sum half-way."""
CELLS = Path("checkpoints/grid")
"""Where `espalier grid` keeps its cells."""
SHORT = 16
"""Digits of a run in the name of its folder."""
RUN_NOTE, CHECKPOINT = rf"{CHECKPOINTS}/([0-9a-f]{{64}})", rf"{CHECKPOINTS}/([0-9a-f]{{64}})/step-\d+"
"""Names in a store: what a run trains, and one of its checkpoints."""


@dataclass(frozen=True)
class Leftover:
    """Something that takes space, and may be removed unless there is a reason to keep it."""

    kind: str
    name: str
    size_bytes: int
    """What its removal frees, as far as that can be told."""
    modified: datetime
    why: str
    """Why it may go."""
    reason_to_keep: str | None
    remove: Callable[[], bool]
    """Removes it; returns whether it did, since a run may have begun to use it."""


@dataclass(frozen=True)
class Needed:
    """What must stay."""

    trainings: frozenset[str]
    """`training_key` of the trainings that current params may ask for."""
    since: datetime
    """What was written later stays."""

    def reason_to_keep(self, modified: datetime, training: str | None = "", *, is_held: bool = False) -> str | None:
        """Return why something must stay; None if it may go.

        Args:
            modified: When it was last written.
            training: Key of the training that it belongs to; empty for none, None where it is unknown.
            is_held: Whether a process works with it.
        """
        if is_held:
            return IN_USE
        if modified > self.since:
            return YOUNG
        if training is None:
            return UNKNOWN
        return CURRENT if training in self.trainings else None


def training_key(content: Any) -> str | None:  # noqa: ANN401  # whatever a file holds
    """Return seed and finetune block of a params file or of a training's record, in one form; None if it has none.

    What changes no weight is left out, as in the fingerprint of a training.

    Of a params file with several rounds it is that of the last training.
    """
    try:
        rounds = RoundsParams.model_validate(content.get("rounds", {}))
        params = FinetuneParams.model_validate(content["finetune"]).after_rounds(rounds).of_weights()
        return json.dumps([int(content["seed"]), params.model_dump(mode="json")], sort_keys=True)
    except (AttributeError, TypeError, KeyError, ValueError, ValidationError, InputError):
        return None


def _round_keys(content: Any) -> set[str | None]:  # noqa: ANN401  # whatever a file holds
    """Return `training_key` of the training after each round but the last of a params file."""
    try:
        rounds = RoundsParams.model_validate(content.get("rounds", {}))
        recovery = FinetuneParams.model_validate(content["finetune"]).in_round(rounds).model_dump(mode="json")
        seeds = [derive_seed(int(content["seed"]), "round", index) for index in range(1, rounds.count)]
    except (AttributeError, TypeError, KeyError, ValueError, ValidationError):
        return set()
    return {training_key({"seed": seed, "finetune": recovery}) for seed in seeds}


def current_trainings(checkout: Path) -> frozenset[str]:
    """Return the trainings that params.yaml and dvc.lock of a checkout ask for, as they stand and as committed.

    Raises:
        InputError: params.yaml is invalid, so that it is unknown what it may need.
    """
    params, lockfile = checkout / "params.yaml", checkout / "dvc.lock"
    trees = [load_params(params).model_dump(mode="json")] if params.is_file() else []
    texts = [git_output(checkout, "show", f"HEAD:./{name}") for name in (params.name, lockfile.name)]
    texts += [lockfile.read_text(errors="replace")] if lockfile.is_file() else []
    for text in filter(None, texts):
        tree = parse_yaml(text, f"params.yaml or dvc.lock of {checkout}")
        trees += [tree, _locked_params(tree)]
    keys = (key for tree in trees for key in (training_key(tree), *_round_keys(tree)))
    return frozenset(filter(None, keys))


def _locked_params(tree: Any) -> Any:  # noqa: ANN401  # whatever a file holds
    try:
        return tree["stages"]["finetune"]["params"]["params.yaml"]
    except (TypeError, KeyError):
        return None


def find_checkpoints(checkout: Path, needed: Needed) -> Iterator[Leftover]:
    """List the trainings whose checkpoints are in a checkout."""
    patterns = itertools.product((FOLDER, ROUNDS), ("[0-9a-f]*/", ".[0-9a-f]*/"))  # the latter were being removed
    for folder in sorted(folder for place, pattern in patterns for folder in (checkout / place).glob(pattern)):
        size_bytes, modified = measure(folder)
        training = "" if folder.name.startswith(".") else _read_training(folder)
        keep = needed.reason_to_keep(modified, training, is_held=_is_held(folder))
        remove = partial(_remove_folder, folder, folder)
        yield Leftover(
            "checkpoints", str(folder.relative_to(checkout)), size_bytes, modified, "other params", keep, remove
        )


def find_sums(checkout: Path, needed: Needed) -> Iterator[Leftover]:
    """List the sums of measurements that stopped half-way in a checkout; one in progress is rewritten all the time."""
    for path in sorted((checkout / SUMS).glob("[0-9a-f]*.safetensors")):
        file = path.stat()
        modified = datetime.fromtimestamp(file.st_mtime, UTC)
        keep = needed.reason_to_keep(modified)
        name = str(path.relative_to(checkout))
        yield Leftover(
            "importance", name, file.st_size, modified, "stopped half-way", keep, partial(_remove_file, path)
        )


def find_cells(checkout: Path, needed: Needed) -> Iterator[Leftover]:
    """List the cells of grids in a checkout, and what a stopped one left; a grid that needs them measures them anew."""
    folder = checkout / CELLS
    is_held = _is_held(folder)
    for path in sorted(path for path in folder.glob("*") if path.is_dir()):
        size_bytes, modified = measure(path)
        keep = needed.reason_to_keep(modified, is_held=is_held)
        name, remove = str(path.relative_to(checkout)), partial(_remove_folder, path, folder)
        yield Leftover("grid cell", name, size_bytes, modified, "of a grid", keep, remove)


def _remove_file(path: Path) -> bool:
    path.unlink(missing_ok=True)
    return True


def held_trainings(checkout: Path) -> set[str]:
    """Return the first 16 digits of the trainings that run in a checkout."""
    places = [checkout / FOLDER, *(checkout / ROUNDS).glob("[0-9a-f]*/round-*/checkpoints")]
    return {folder.name for place in places for folder in place.glob("[0-9a-f]*/") if _is_held(folder)}


def _is_held(folder: Path) -> bool:
    with reserved(folder) as is_free:
        return not is_free


def _read_training(folder: Path) -> str | None:
    try:
        return training_key(read_json(folder / TRAINING))
    except InputError:
        return None


def _remove_folder(folder: Path, lock: Path) -> bool:
    """Remove a folder unless a process works in the folder that has the lock: itself, or that of all cells."""
    with reserved(lock) as is_free:
        if is_free:
            shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def measure(folder: Path) -> tuple[int, datetime]:
    """Return the bytes that the removal of a folder frees, and when something in it was last written.

    A file that has links from elsewhere, such as from DVC's cache, frees nothing. Files that vanish are left out; a
    folder that vanishes as a whole has no size and was written now.
    """
    files = []
    for place, folders, names in os.walk(folder):
        for name in (".", *names, *folders):
            with suppress(FileNotFoundError):
                files.append((Path(place) / name).lstat())
    links = Counter(file.st_ino for file in files)
    inside = {file.st_ino: file.st_size for file in files if links[file.st_ino] == file.st_nlink}
    modified = max((file.st_mtime for file in files), default=time.time())
    return sum(inside.values()), datetime.fromtimestamp(modified, UTC)


def find_in_store(store: StoreContents, needed: Needed, held: set[str]) -> Iterator[Leftover]:
    """List the checkpoints in a store, files without a manifest, and uploads that never ended.

    Versions and whatever else has a manifest or a key of its own is not listed.

    Args:
        store: The store.
        needed: What must stay.
        held: First 16 digits of the trainings that run on this machine.

    Raises:
        InputError: A manifest is damaged, or the store cannot be read.
    """
    objects, uploads = store.objects(), store.unfinished_uploads()  # before the manifests that may name them
    folders = store.folders()
    yield from _find_runs(store, folders, needed, held)
    named = cache(lambda: _named(store.folders()))  # read once more, before the first is removed
    for sha256 in sorted(set(objects) - _named(folders)):
        remove = partial(_remove_object, store, objects[sha256], sha256, named)
        yield _incomplete(objects[sha256], needed, sha256[:12], "no manifest names it", remove)
    for upload in uploads:
        sha256 = Path(upload.item.key).name
        remove = partial(_abort, store, upload)
        yield _incomplete(upload.item, needed, sha256[:12], "its parts were never put together", remove)


def _find_runs(
    store: StoreContents, folders: Mapping[str, Folder], needed: Needed, held: set[str]
) -> Iterator[Leftover]:
    notes = store.notes()
    runs: dict[str, list[str]] = {match[1]: [] for name in notes if (match := re.fullmatch(RUN_NOTE, name))}
    for name in folders:
        if match := re.fullmatch(CHECKPOINT, name):
            runs.setdefault(match[1], []).append(name)
    for run, names in sorted(runs.items()):
        note, content = notes.get(f"{CHECKPOINTS}/{run}", (None, None))
        items = [folders[name].item for name in names] + ([note] if note else [])
        modified = max(item.modified for item in items)
        keep = needed.reason_to_keep(modified, training_key(content), is_held=run[:SHORT] in held)
        size_bytes = sum(entry.size_bytes for name in names for entry in folders[name].manifest.files)
        remove = partial(_remove_run, store, run, names)
        yield Leftover("stored checkpoints", run[:SHORT], size_bytes, modified, "other params", keep, remove)


def _named(folders: Mapping[str, Folder]) -> set[str]:
    return {entry.sha256 for folder in folders.values() for entry in folder.manifest.files}


def _incomplete(item: Item, needed: Needed, name: str, why: str, remove: Callable[[], bool]) -> Leftover:
    keep = needed.reason_to_keep(item.modified)
    return Leftover("incomplete upload", name, item.size_bytes, item.modified, why, keep, remove)


def _remove_run(store: StoreContents, run: str, names: list[str]) -> bool:
    store.remove(names)
    store.delete_note(f"{CHECKPOINTS}/{run}")
    return True


def _remove_object(store: StoreContents, item: Item, sha256: str, named: Callable[[], set[str]]) -> bool:
    if sha256 in named():
        return False
    store.delete([item.key])
    return True


def _abort(store: StoreContents, upload: UnfinishedUpload) -> bool:
    store.abort(upload)
    return True
