"""Checkpoints on this machine <-> their copies in a store, uploaded while the training runs."""

import os
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from stages.runtime.errors import InputError, warn
from stages.storage.s3 import Store


class CheckpointUploads:
    """The copies of one run's checkpoints in a store.

    One upload runs at a time. If checkpoints are saved faster than they are uploaded, only the newest one waits. A
    failed upload prints a warning and does not stop the training.

    Args:
        store: Where the copies go.
        run: Fingerprint of the run.
    """

    def __init__(self, store: Store, run: str) -> None:
        self.store, self.prefix = store, f"checkpoints/{run}/"
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self.pending: Future[None] | None = None
        self.folder = Path()  # that `pending` uploads

    def upload(self, path: Path) -> None:
        """Upload a checkpoint in the background, in place of one that still waits."""
        if self.pending is not None and self.pending.cancel():
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder = Path(tempfile.mkdtemp(prefix=".upload.", dir=path.parent))
        _link_or_copy(path, self.folder / path.name)  # so that the checkpoint may be removed before it is uploaded
        self.pending = self.pool.submit(self._push, self.folder, path.stem)

    def download(self, folder: Path) -> None:
        """Download the newest intact copy, if any, to a folder without checkpoints.

        Raises:
            InputError: The store has copies but none can be downloaded; the training must not start from step 0 then.
        """
        names = self.store.names(self.prefix)
        while names:
            try:
                self._pull(names.pop(), folder)
            except InputError as error:
                if not names:
                    raise
                warn(f"{error.message}; the copy before it is used")
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
            (Path(temporary) / "checkpoint" / file).replace(folder / file)

    def _push(self, folder: Path, name: str) -> None:
        try:
            self.store.push(folder, f"{self.prefix}{name}")
        except InputError as error:
            warn(f"{error.message}; the checkpoint is kept on this machine only")
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no hard links
        shutil.copyfile(source, target)
