"""Checkpoints on this machine <-> their copies in a store, brought there while the training goes on."""

import os
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import click

from stages.runtime.errors import InputError
from stages.storage.s3 import Store


class CheckpointUploads:
    """The copies of one run's checkpoints.

    One upload runs at a time. Where checkpoints come faster than they can be sent, only the newest waits. A store that
    is away stops no training.

    Args:
        store: Where they go.
        run: Fingerprint of the run.
    """

    def __init__(self, store: Store, run: str) -> None:
        self.store, self.prefix = store, f"checkpoints/{run}/"
        self.pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self.waiting: Future[None] | None = None

    def upload(self, path: Path) -> None:
        """Send a checkpoint as soon as the one before it is through."""
        if self.waiting is not None:
            self.waiting.cancel()
        home = Path(tempfile.mkdtemp(prefix=".upload.", dir=path.parent))
        _link(path, home / path.name)  # stays when the checkpoint itself is dropped
        self.waiting = self.pool.submit(self._send, home, path.stem)
        self.waiting.add_done_callback(lambda _: shutil.rmtree(home, ignore_errors=True))

    def fetch(self, folder: Path) -> None:
        """Bring the newest whole copy to a folder that has no checkpoint of its own.

        Raises:
            InputError: There are some, but none can be had; without one the training would begin anew.
        """
        names = self.store.names(self.prefix)
        while names:
            try:
                self._pull(names.pop(), folder)
            except InputError as error:
                if not names:
                    raise
                click.echo(f"Warning: {error.message}; the copy before it is taken", err=True)
            else:
                return

    def _pull(self, name: str, folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=_made(folder), prefix=".download.") as place:
            self.store.pull(name, Path(place) / "checkpoint")
            for path in (Path(place) / "checkpoint").iterdir():
                path.replace(folder / path.name)

    def close(self) -> None:
        """Wait for the last upload."""
        self.pool.shutdown(wait=True)

    def _send(self, home: Path, name: str) -> None:
        try:
            self.store.push(home, f"{self.prefix}{name}")
        except InputError as error:
            click.echo(f"Warning: {error.message}; the checkpoint is kept on this machine only", err=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
