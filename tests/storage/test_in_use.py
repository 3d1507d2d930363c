"""Folders that processes work in."""

import errno
import fcntl
import os
import shutil
import threading
from pathlib import Path

import pytest

from stages.runtime.errors import InputError
from stages.storage.in_use import LOCK, hold_folder, reserved


def is_free(folder):
    """Whether nobody works in a folder."""
    with reserved(folder) as found:
        return found


def test_a_folder_is_in_use_until_the_last_process_ends(tmp_path):
    """Two may work in it at once; a folder that was never held is free."""
    folder = tmp_path / "new" / "run"
    (tmp_path / "plain").mkdir()
    assert is_free(tmp_path / "plain")
    with hold_folder(folder), hold_folder(folder):
        assert not is_free(folder)

    assert is_free(folder)


def test_a_folder_whose_lock_cannot_be_opened_counts_as_in_use(tmp_path):
    """Nobody can tell; a file in its place stays."""
    (tmp_path / "file").touch()

    assert not is_free(tmp_path / "file")
    assert is_free(tmp_path / "missing")


def test_a_folder_on_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch):
    """Nobody can tell whether it is in use."""
    hold_folder(tmp_path).close()

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InputError, match=rf"^cannot lock {tmp_path}/lock: No locks available; move the folder to a "):
        is_free(tmp_path)


def test_a_folder_that_is_removed_meanwhile_is_made_again(tmp_path):
    """Whoever begins during a removal waits, and then holds a lock that the next clean-up finds."""
    folder, held = tmp_path / "run", []
    hold_folder(folder).close()
    (folder / "step").touch()
    thread = threading.Thread(target=lambda: held.append(hold_folder(folder)))
    with reserved(folder) as found:
        thread.start()
        thread.join(0.2)
        assert (found, held) == (True, [])
        shutil.rmtree(folder)
    thread.join()

    assert [path.name for path in folder.iterdir()] == [LOCK]
    assert not is_free(folder)
    held[0].close()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    """In one line."""
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        hold_folder(tmp_path / "file" / "run")


def test_a_folder_that_is_removed_as_soon_as_it_was_found_is_made_again(tmp_path, monkeypatch):
    """Another process had it when this one made it, and removed it before this one looked."""
    mkdir, answers = Path.mkdir, [FileExistsError(errno.EEXIST, "File exists")]

    def make(path, *args, **options):
        """Find the folder once, which is not there."""
        if answers:
            raise answers.pop()
        mkdir(path, *args, **options)

    monkeypatch.setattr(Path, "mkdir", make)
    with hold_folder(tmp_path / "folder"):
        assert (tmp_path / "folder").is_dir()
