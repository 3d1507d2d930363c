"""Copies of checkpoints in the store."""

import errno
import math
import os
import signal
import threading
from dataclasses import replace

import pytest
import torch

from stages.finetune.checkpoint import Checkpoint, Checkpoints
from stages.finetune.curve import CurvePoint
from stages.finetune.interrupt import StoppedError
from stages.finetune.snapshots import TrainingClock
from stages.finetune.trainer import Trainer
from stages.runtime.errors import InputError, UnavailableError
from stages.storage.s3 import open_store
from tests.orchestra import until

RUN = "f" * 64
CURVE = [CurvePoint(0, None, ((0.9, 0.5), (0.99, 0.4)))]


def checkpoint(step):
    """A checkpoint of four numbers."""
    return Checkpoint(step, {"unet.weight": torch.full((4,), float(step))}, [0.1], CURVE)


def test_another_machine_resumes_from_the_newest_copy(connect, tmp_path):
    """It is equal to the saved checkpoint; other runs do not find it."""
    first = Checkpoints(tmp_path / "first", RUN, connect())
    for step in (2, 4, 6):
        first.save(checkpoint(step))
    first.wait()
    second = Checkpoints(tmp_path / "second", RUN, connect())
    found = second.newest()

    assert found.step == 6
    assert torch.equal(found.tensors["unet.weight"], torch.full((4,), 6.0))
    assert found.curve == CURVE
    assert Checkpoints(tmp_path / "other", "e" * 64, connect()).newest() is None


def test_a_damaged_copy_is_replaced_by_the_previous_one(connect, tmp_path, capsys):
    """A warning is printed; it is an error only if no copy is intact."""
    store = connect()
    first = Checkpoints(tmp_path / "first", RUN, store)
    for step in (2, 4):
        first.save(checkpoint(step))
        first.uploads.pending.result()
    first.wait()

    def delete(step):
        (entry,) = store._read(f"checkpoints/{RUN}/step-{step:08}").files
        store.client.delete_object(Bucket=store.bucket, Key=store._object(entry.sha256))

    delete(4)
    assert Checkpoints(tmp_path / "second", RUN, connect()).newest().step == 2
    assert "there is no such object; the copy before it is used" in capsys.readouterr().err

    delete(2)
    with pytest.raises(InputError, match="there is no such object"):
        Checkpoints(tmp_path / "third", RUN, connect()).newest()


def saved(connect, folder, steps, keep=2, store=None):
    """Save checkpoints one after the other, each uploaded before the next; returns the names in the store."""
    checkpoints = Checkpoints(folder, RUN, store or connect(), keep)
    for step in steps:
        checkpoints.save(checkpoint(step))
        checkpoints.wait()
    return connect().names("checkpoints/")


@pytest.mark.parametrize("keep", [pytest.param(1, marks=pytest.mark.e2e), 2])
def test_the_store_keeps_as_many_copies_as_the_disk(connect, folder, tmp_path, keep):
    """Older copies go with their files once a newer one is complete; versions and other runs stay."""
    store = connect()
    store.push(folder, "models/digits/1")
    store.push(folder, f"checkpoints/{'e' * 64}/step-00000001")
    names = saved(connect, tmp_path / "first", (2, 4, 6, 8), keep)
    entries = {name: {entry.sha256 for entry in store._read(name).files} for name in store.names()}
    prefix = store._key("objects/")

    assert names[1:] == [f"checkpoints/{RUN}/step-0000000{step}" for step in (2, 4, 6, 8)[-keep:]]
    assert {key.rpartition("/")[2] for key in store._keys(prefix)} == set().union(*entries.values())
    assert Checkpoints(tmp_path / "second", RUN, connect()).newest().step == 8


def test_a_copy_goes_only_after_a_newer_one_is_complete(connect, tmp_path, capsys):
    """An upload that fails removes nothing."""
    saved(connect, tmp_path / "first", (2, 4))
    names = saved(connect, tmp_path / "first", (6, 8), store=connect(lambda _: ("cut", 0, "up")))

    assert "the checkpoint is kept on this machine only" in capsys.readouterr().err
    assert names == [f"checkpoints/{RUN}/step-0000000{step}" for step in (2, 4)]


def test_a_store_that_refuses_to_delete_keeps_all_copies(connect, tmp_path, monkeypatch, capsys):
    """With one warning, and no harm to the training."""
    store, code = connect(), {"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}

    def refuse(**_):
        raise store.client.exceptions.ClientError(code, "DeleteObject")

    monkeypatch.setattr(store.client, "delete_object", refuse)
    names = saved(connect, tmp_path / "first", (2, 4, 6), keep=1, store=store)

    assert [name[-1] for name in names] == ["2", "4", "6"]
    assert capsys.readouterr().err.count("access is denied") == 1


def test_a_damaged_checkpoint_is_written_anew_in_its_place(tmp_path):
    """The step that is taken again has the same name, and stays."""
    first = Checkpoints(tmp_path, RUN)
    for step in (2, 4):
        first.save(checkpoint(step))
    newest = max(first.folder.iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    assert first.newest().step == 2
    first.save(checkpoint(4))

    assert first.newest().step == 4


def test_a_training_that_diverged_is_read_as_it_was_saved(tmp_path):
    """Losses that are not finite are no damage, which would take its steps again."""
    saved_one = replace(checkpoint(2), losses=[math.inf, math.nan], curve=[CurvePoint(2, math.inf, ((0.9, math.nan),))])
    Checkpoints(tmp_path, RUN).save(saved_one)
    found = Checkpoints(tmp_path, RUN).newest()

    assert (found.step, repr(found.losses), repr(found.curve)) == (2, "[inf, nan]", repr(saved_one.curve))


def test_damaged_checkpoints_displace_none(tmp_path, capsys):
    """Of steps that the training takes again after it went on from an older one."""
    first = Checkpoints(tmp_path, RUN, keep=2)
    for step in (100, 150):
        first.save(checkpoint(step))
    for path in first.folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    second = Checkpoints(tmp_path, RUN, keep=2)
    assert second.newest() is None
    second.save(checkpoint(50))

    assert second.newest().step == 50
    assert capsys.readouterr().err.count("this checkpoint is skipped") == 2


def test_the_store_is_asked_where_every_checkpoint_is_damaged(connect, tmp_path):
    """Before the training would begin at step 0."""
    saved(connect, tmp_path / "first", (2, 4))
    first = Checkpoints(tmp_path / "first", RUN, connect())
    for path in first.folder.glob("step-*"):
        path.write_bytes(path.read_bytes()[:-1])
    assert first.newest().step == 4
    first.save(checkpoint(6))
    first.wait()

    assert [path.stem[-1] for path in sorted(first.folder.iterdir())] == ["4", "6"]  # what was downloaded is intact


def test_a_damaged_copy_makes_room_for_a_new_one(connect, tmp_path):
    """Whether its object is missing or was damaged before its upload; it counts among no copies that are kept."""
    for step, harm in ((4, "missing"), (6, "damaged")):
        store = connect()
        saved(connect, tmp_path / f"before {step}", (step - 2, step))
        name = f"checkpoints/{RUN}/step-{step:08d}"
        if harm == "missing":
            (entry,) = store._read(name).files
            store.client.delete_object(Bucket=store.bucket, Key=store._object(entry.sha256))
        else:
            store.remove([name], among="checkpoints/")
            (tmp_path / "bad").mkdir()
            (tmp_path / "bad" / f"step-{step:08d}.safetensors").write_bytes(b"no tensors")
            store.push(tmp_path / "bad", name)
        second = Checkpoints(tmp_path / f"after {step}", RUN, connect())
        assert second.newest().step == step - 2
        for number in (step - 1, step):
            second.save(replace(checkpoint(number), clock=TrainingClock(seconds=9.0)))
            second.wait()
        assert [int(name[-1]) for name in connect().names("checkpoints/")] == [step - 1, step]
        assert Checkpoints(tmp_path / f"third {step}", RUN, connect()).newest().clock.seconds == 9.0
        store.remove(connect().names("checkpoints/"))


def test_an_unreachable_copy_is_not_taken_for_a_damaged_one(connect, tmp_path, monkeypatch):
    """It stays in the store."""
    names = saved(connect, tmp_path / "first", (2, 4), keep=3)
    second = Checkpoints(tmp_path / "second", RUN, connect(), keep=3)
    pull, failures = second.uploads.store.pull, iter([UnavailableError("no answer")])

    def pull_or_fail(name, folder):
        if error := next(failures, None):
            raise error
        return pull(name, folder)

    monkeypatch.setattr(second.uploads.store, "pull", pull_or_fail)
    assert second.newest().step == 2
    second.save(checkpoint(3))
    second.wait()
    assert connect().names("checkpoints/") == [names[0], names[0][:-1] + "3", names[1]]


def test_of_a_copy_only_the_checkpoint_is_taken(connect, tmp_path):
    """Other files in its manifest stay out of the folder of checkpoints."""
    store, name = connect(), "step-00000002.safetensors"
    Checkpoints(tmp_path / "first", RUN).save(checkpoint(2))
    copy = tmp_path / "copy"
    copy.mkdir()
    (tmp_path / "first" / RUN[:16] / name).rename(copy / name)
    (copy / "step-99999999.safetensors").write_bytes(b"not a checkpoint")
    store.push(copy, f"checkpoints/{RUN}/step-00000002")
    second = Checkpoints(tmp_path / "second", RUN, connect())

    assert second.newest().step == 2
    assert [path.name for path in second.folder.iterdir()] == [name]


def test_without_hard_links_the_checkpoint_is_copied(connect, tmp_path, monkeypatch):
    """The upload works the same way."""

    def refuse(*_):
        raise OSError("Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    first = Checkpoints(tmp_path / "first", RUN, connect())
    first.save(checkpoint(2))
    first.wait()

    assert Checkpoints(tmp_path / "second", RUN, connect()).newest().step == 2


@pytest.mark.parametrize("calls", [("os.link", "shutil.copyfile"), ("tempfile.mkdtemp",)])
def test_a_disk_without_room_for_a_copy_does_not_stop_the_training(connect, tmp_path, monkeypatch, capsys, calls):
    """Without hard links a copy is needed; a warning says that the store lacks this one, and the next is sent."""

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoints = Checkpoints(tmp_path / "first", RUN, connect())
    with monkeypatch.context() as patch:
        for name in calls:
            patch.setattr(name, refuse)
        checkpoints.save(checkpoint(2))
        checkpoints.wait()
    assert Checkpoints(tmp_path / "first", RUN).newest().step == 2
    assert "step-00000002.safetensors is not uploaded" in capsys.readouterr().err
    assert connect().names("checkpoints/") == []
    checkpoints.save(checkpoint(4))
    checkpoints.wait()

    assert [name[-8:] for name in connect().names("checkpoints/")] == ["00000004"]
    assert not list((tmp_path / "first").rglob(".upload.*"))


def test_uploads_and_downloads_leave_no_temporary_files(connect, tmp_path):
    """The folder holds the checkpoint alone."""
    first = Checkpoints(tmp_path / "first", RUN, connect())
    first.save(checkpoint(2))
    first.wait()
    second = Checkpoints(tmp_path / "second", RUN, connect())
    second.newest()

    for checkpoints in (first, second):
        assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000002.safetensors"]


def occupied(checkpoints):
    """Keep the thread of the uploads from the next one until the event that is returned is set."""
    free, begun = threading.Event(), threading.Event()
    checkpoints.uploads.pool.submit(lambda: (begun.set(), free.wait(60)))
    assert begun.wait(60)
    return free


def test_of_the_checkpoints_that_wait_only_the_newest_is_uploaded(connect, tmp_path):
    """Those before it leave no copy, in the store or on the disk."""
    checkpoints = Checkpoints(tmp_path, RUN, connect(), keep=3)
    free = occupied(checkpoints)
    for step in (2, 4, 6):
        checkpoints.save(checkpoint(step))
    free.set()
    checkpoints.wait()

    assert connect().names() == [f"checkpoints/{RUN}/step-00000006"]
    assert not list(checkpoints.folder.glob(".upload.*"))


def test_a_finished_run_is_removed_after_its_last_upload(connect, tmp_path):
    """The copy in the store is complete then."""
    checkpoints = Checkpoints(tmp_path, RUN, connect())
    free = occupied(checkpoints)
    checkpoints.save(checkpoint(2))
    ending = threading.Thread(target=checkpoints.clear)
    ending.start()
    ending.join(0.2)
    free.set()
    ending.join()
    checkpoints.wait()

    assert not checkpoints.folder.exists()
    assert Checkpoints(tmp_path / "second", RUN, connect()).newest().step == 2


def test_a_training_begins_although_the_store_is_unreachable(connect, tmp_path, capsys):
    """A warning says that the store does not know of it."""
    with Checkpoints(tmp_path, RUN, connect(lambda _: ("cut", 0, "up"))).hold({}):
        assert "the store does not know that this training is in progress" in capsys.readouterr().err


def test_an_unreachable_store_does_not_stop_the_training(connect, tmp_path, capsys):
    """A warning is printed, and the checkpoint is on this machine."""
    store = connect(lambda _: ("cut", 0, "up"))
    checkpoints = Checkpoints(tmp_path / "first", RUN, store)
    checkpoints.save(checkpoint(2))
    checkpoints.wait()

    assert "the checkpoint is kept on this machine only" in capsys.readouterr().err
    assert Checkpoints(tmp_path / "first", RUN).newest().step == 2


def test_a_stopped_training_is_in_the_store(connect, tmp_path, unet, scheduler, images, short_training):
    """The training ends after the upload of its last checkpoint, which takes longer than a step."""
    store = connect(lambda _: ("slow", 0.02, "up"))
    params = short_training(steps=100, heldout_every=100, checkpoint_every=100)
    run = Trainer(unet, scheduler, images, params, 0)
    step = run.step
    run.step = lambda: (step(), os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedError):
        run.run(Checkpoints(tmp_path, RUN, store))

    assert connect().names() == [f"checkpoints/{RUN}/step-00000001"]


def test_an_unexpected_fault_of_an_upload_is_raised(connect, tmp_path, monkeypatch):
    """No thread ends with an error that nobody reads."""
    store = connect()
    monkeypatch.setattr(store.client, "put_object", lambda **_: {}["ETag"])
    checkpoints = Checkpoints(tmp_path, RUN, store)
    checkpoints.save(checkpoint(2))

    with pytest.raises(KeyError):
        checkpoints.wait()


def test_an_unexpected_error_of_an_earlier_upload_is_raised_by_the_next(connect, monkeypatch, tmp_path):
    """It is not forgotten for that of the last one."""
    store = connect()
    monkeypatch.setattr(store.client, "put_object", lambda **_: {}["ETag"])
    checkpoints = Checkpoints(tmp_path, RUN, store)
    checkpoints.save(checkpoint(2))
    until(checkpoints.uploads.pending.done)

    with pytest.raises(KeyError):
        checkpoints.save(checkpoint(4))


def test_the_store_comes_from_the_environment(connect, monkeypatch):
    """Without the variable there is no store."""
    uri = connect().uri
    monkeypatch.delenv("ESPALIER_STORE", raising=False)
    assert open_store() is None

    monkeypatch.setenv("ESPALIER_STORE", uri)
    assert open_store().uri == uri


@pytest.mark.parametrize("name", [".upload.left", ".download.left"])
def test_what_a_killed_transfer_left_is_removed_by_the_next_process(connect, tmp_path, name):
    """A checkpoint is some gigabytes; another process that works in the folder still needs its own."""
    first = Checkpoints(tmp_path, RUN, connect())
    left = first.folder / name
    left.mkdir(parents=True)
    with first.hold({}):
        assert not left.exists()
        left.mkdir()
        with Checkpoints(tmp_path, RUN, connect()).hold({}):
            assert left.exists()
