"""Checkpoints in the store."""

import pytest
import torch

from stages.finetune.checkpoint import Checkpoint, Checkpoints
from stages.finetune.curve import CurvePoint
from stages.runtime.errors import InputError
from stages.storage.s3 import open_store

RUN = "f" * 64
CURVE = [CurvePoint(0, None, ((0.9, 0.5), (0.99, 0.4)))]


def checkpoint(step):
    """A small one."""
    return Checkpoint(step, {"unet.weight": torch.full((4,), float(step))}, [0.1], CURVE)


def test_another_machine_goes_on_from_the_copy(connect, tmp_path):
    """The newest one, as it was saved; the uploads of those before it may have been skipped."""
    here = Checkpoints(tmp_path / "here", RUN, connect())
    for step in (2, 4, 6):
        here.save(checkpoint(step))
    here.uploads.close()
    there = Checkpoints(tmp_path / "there", RUN, connect())
    found = there.newest()

    assert found.step == 6
    assert torch.equal(found.tensors["unet.weight"], torch.full((4,), 6.0))
    assert found.curve == CURVE
    assert Checkpoints(tmp_path / "other", "e" * 64, connect()).newest() is None


def test_a_damaged_copy_gives_way_to_the_one_before(connect, tmp_path, capsys):
    """With a warning; only where none is whole is it an error."""
    store = connect()
    here = Checkpoints(tmp_path / "here", RUN, store)
    for step in (2, 4):
        here.save(checkpoint(step))
        here.uploads.waiting.result()
    here.uploads.close()

    def lose(step):
        (entry,) = store._read(f"checkpoints/{RUN}/step-{step:08}").files
        store.client.delete_object(Bucket=store.bucket, Key=store._object(entry.sha256))

    lose(4)
    assert Checkpoints(tmp_path / "there", RUN, connect()).newest().step == 2
    assert "there is no such object; the copy before it is taken" in capsys.readouterr().err

    lose(2)
    with pytest.raises(InputError, match="there is no such object"):
        Checkpoints(tmp_path / "elsewhere", RUN, connect()).newest()


def test_a_file_system_without_links_is_good_enough(connect, tmp_path, monkeypatch):
    """The checkpoint is copied before it is sent."""

    def refuse(*_):
        raise OSError("Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    here = Checkpoints(tmp_path / "here", RUN, connect())
    here.save(checkpoint(2))
    here.uploads.close()

    assert Checkpoints(tmp_path / "there", RUN, connect()).newest().step == 2


def test_nothing_is_left_of_an_upload_or_a_download(connect, tmp_path):
    """The checkpoints, and no hidden folder beside them."""
    here = Checkpoints(tmp_path / "here", RUN, connect())
    here.save(checkpoint(2))
    here.uploads.close()
    there = Checkpoints(tmp_path / "there", RUN, connect())
    there.newest()

    for kept in (here, there):
        assert [path.name for path in kept.folder.iterdir()] == ["step-00000002.safetensors"]


def test_a_store_that_is_away_stops_no_training(connect, tmp_path, capsys):
    """One line says that the copy is missing, and the checkpoint is here."""
    store = connect(lambda _: ("cut", 0, "up"))
    kept = Checkpoints(tmp_path / "here", RUN, store)
    kept.save(checkpoint(2))
    kept.uploads.close()

    assert "the checkpoint is kept on this machine only" in capsys.readouterr().err
    assert Checkpoints(tmp_path / "here", RUN).newest().step == 2


def test_the_environment_names_the_store(connect, monkeypatch):
    """Without it there is none."""
    uri = connect().uri
    monkeypatch.delenv("ESPALIER_STORE", raising=False)
    assert open_store() is None

    monkeypatch.setenv("ESPALIER_STORE", uri)
    assert open_store().uri == uri
