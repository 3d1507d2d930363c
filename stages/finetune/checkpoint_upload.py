"""Checkpoints on this machine <-> their copies in a store, uploaded while the training runs."""

import os
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from stages.runtime.errors import InputError, UnavailableError, first_line, warn
from stages.storage.s3 import Store
from stages.storage.tensors import read_tensors

CHECKPOINTS = "checkpoints"
"""Folder of the store with the checkpoints of each run, and of its notes with what each run trains."""


class CheckpointUploads:
    """The copies of one run's checkpoints in a store.

    One upload runs at a time. If checkpoints are saved faster than they are uploaded, only the newest one waits. A
    failed upload prints a warning and does not stop the training.

    Args:
        store: Where the copies go.
        run: Fingerprint of the run.
        keep: Number of copies that are kept.
    """

    def __init__(self, store: Store, run: str, keep: int) -> None:
        self.store, self.keep, self.run = store, keep, run
        self.prefix = f"{CHECKPOINTS}/{run}/"
        self.warned: set[str] = set()
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self.pending: Future[None] | None = None
        self.folder = Path()  # that `pending` uploads
        self.damaged: set[str] = set()  # copies whose steps the training takes again

    def note(self, training: Mapping[str, object]) -> None:
        """Write down what the run trains, and that it is in progress, before anything is downloaded or uploaded."""
        try:
            self.store.write_note(f"{CHECKPOINTS}/{self.run}", training)
        except InputError as error:
            self._warn_once(f"{error.message}; the store does not know that this training is in progress")

    def upload(self, path: Path) -> None:
        """Upload a checkpoint in the background, in place of one that still waits; raises what the last one raised."""
        try:
            folder = _copy_of(path)
        except OSError as error:  # a full disk without hard links; one that waits is uploaded all the same
            self._warn_once(f"{path.name} is not uploaded ({first_line(error)}); it is kept on this machine only")
            return
        if self.pending is not None and self.pending.cancel():
            shutil.rmtree(self.folder, ignore_errors=True)
        elif self.pending is not None and self.pending.done():
            self.pending.result()
        self.folder, self.pending = folder, self.pool.submit(self._push, folder, path.stem)

    def download(self, folder: Path) -> None:
        """Download the newest intact copy, if any, to a folder without checkpoints.

        Raises:
            InputError: The store has copies but none can be downloaded; the training must not start from step 0 then.
        """
        names = self.store.names(self.prefix)
        while names:
            name = names.pop()
            try:
                self._pull(name, folder)
            except InputError as error:
                if not names:
                    raise
                warn(f"{error.message}; the copy before it is used")
                if not isinstance(error, UnavailableError):
                    self.damaged.add(name)
            else:
                return

    def wait(self) -> None:
        """Wait for the last upload, and raise what it raised."""
        if self.pending is not None:
            self.pending.result()

    def _pull(self, name: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download.") as temporary:
            self.store.pull(name, Path(temporary) / "checkpoint")
            file = f"{Path(name).name}.safetensors"  # whatever else the copy holds stays behind
            if not (Path(temporary) / "checkpoint" / file).is_file():
                raise InputError(f"{name} in {self.store.uri} holds no {file}; remove its manifest")
            read_tensors(Path(temporary) / "checkpoint" / file)  # it may have been damaged before it was uploaded
            (Path(temporary) / "checkpoint" / file).replace(folder / file)

    def _push(self, folder: Path, stem: str) -> None:
        name = f"{self.prefix}{stem}"
        try:
            if name in self.damaged:
                self.store.remove([name], among=self.prefix)
                self.damaged.remove(name)
            self.store.push(folder, name)
        except InputError as error:
            warn(f"{error.message}; the checkpoint is kept on this machine only")
        else:
            self._prune()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _prune(self) -> None:
        """Remove all copies but the newest `keep`, the last of which is complete by now, and those found damaged."""
        try:
            names = self.store.names(self.prefix)
            intact = [name for name in names if name not in self.damaged]
            if old := set(names) - set(intact[-self.keep :]):
                self.store.remove(old, among=self.prefix)  # a checkpoint names its run, so no other run has equal files
        except InputError as error:
            self._warn_once(f"{error.message}; older copies stay in the store")

    def _warn_once(self, message: str) -> None:
        if message not in self.warned:
            warn(message)
        self.warned.add(message)


def _copy_of(path: Path) -> Path:
    """Link or copy a file, which may be removed before it is uploaded, into a new folder beside it; returns the folder.

    Raises:
        OSError: There is no room; nothing is left.
    """
    folder = Path(tempfile.mkdtemp(prefix=".upload.", dir=path.parent))
    try:
        _link_or_copy(path, folder / path.name)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no hard links
        shutil.copyfile(source, target)
