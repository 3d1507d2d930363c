"""Trainings killed with SIGKILL, at random moments and in the middle of a write or an upload."""

import copy
import itertools
import os
import random
import signal
import time
import traceback

import pytest
import torch

from stages.finetune.checkpoint import Checkpoints
from stages.finetune.params import FinetuneParams
from stages.finetune.trainer import Trainer
from stages.storage.s3 import Store
from stages.storage.tensors import read_tensors, tensors_sha256, write_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
RUN = "c" * 64
PARAMS = FinetuneParams(
    steps=30,
    batch_size=4,
    learning_rate=1e-3,
    schedule="cosine",
    ema_decays=(0.5, 0.9),
    dropout=0.1,
    clip_norm=1.0,
    flip=True,
    heldout_images=4,
    heldout_every=7,
    checkpoint_every=3,
    snapshots=(4, 15),
)


@pytest.fixture
def start(unet, scheduler, images, tmp_path):
    """Return a function that starts a training in a child process, which calls `prepare` first."""

    def begin(name, store=None, prepare=None):
        ready, write_end = os.pipe()
        if child := os.fork():
            os.read(ready, 1)
            return child
        code = 1
        try:
            torch.set_num_threads(1)
            trainer = Trainer(copy.deepcopy(unet), scheduler, images, PARAMS, 0)
            checkpoints = Checkpoints(tmp_path / name, RUN, store() if store else None)
            if prepare:
                prepare(checkpoints)
            os.write(write_end, b"!")
            trainer.run(checkpoints)
            models = {"unet": trainer.unet} | {str(key): model for key, model in trainer.ema_models.models.items()}
            states = {
                f"{key}.{part}": tensor for key, model in models.items() for part, tensor in model.state_dict().items()
            }
            write_tensors(tmp_path / f"{name}.safetensors", states | trainer.snapshots.to_tensors())
            code = 0
        except BaseException:  # noqa: BLE001  # no exception of the child may reach pytest
            traceback.print_exc()
        finally:
            os._exit(code)
        return None

    return begin


@pytest.fixture
def uninterrupted(start, tmp_path):
    """The hash of all weights of an uninterrupted training, and the seconds it took."""
    child, begin = start("uninterrupted"), time.monotonic()
    assert os.waitpid(child, 0)[1] == 0
    return tensors_sha256(read_tensors(tmp_path / "uninterrupted.safetensors")), time.monotonic() - begin


def wait(child):
    """Wait for a process and return its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.e2e)])
def test_kills_at_random_moments_change_no_bit(start, uninterrupted, tmp_path, kills):
    """Each training is killed once and started again; weights, EMA and snapshots are the uninterrupted one's."""
    expected, seconds = uninterrupted
    moments, partial = random.Random(0), 0
    for trial in range(kills):
        delay = moments.uniform(0, 0.9 * seconds)
        for attempt in itertools.count():  # the machine may be faster now than while the seconds were taken
            name = f"trial-{trial}-{attempt}"
            child = start(name)
            time.sleep(delay / 2**attempt)
            os.kill(child, signal.SIGKILL)
            if wait(child) == -signal.SIGKILL:
                break
        partial += bool(list((tmp_path / name).glob("*/.*")))
        assert wait(start(name)) == 0
        assert tensors_sha256(read_tensors(tmp_path / f"{name}.safetensors")) == expected, trial
    print(f"{kills} were killed before their end, {partial} of them while a checkpoint was written")


def test_a_kill_while_a_checkpoint_is_written_keeps_the_previous_one(start, uninterrupted, tmp_path, monkeypatch):
    """The partial file has another name, which is never read."""

    def die_in_writing(checkpoints):
        def fsync(_):
            if list(checkpoints.folder.glob("step-*")):
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr("os.fsync", fsync)

    assert wait(start("killed", prepare=die_in_writing)) == -signal.SIGKILL
    (folder,) = (tmp_path / "killed").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        ".step-00000006.safetensors.part",
        "step-00000003.safetensors",
    ]
    assert wait(start("killed")) == 0
    assert tensors_sha256(read_tensors(tmp_path / "killed.safetensors")) == uninterrupted[0]


@pytest.mark.e2e
def test_a_kill_during_an_upload_loses_nothing(start, uninterrupted, tmp_path, connect):
    """Another machine resumes from the newest complete copy, this one from its own checkpoint."""
    uri = connect().uri

    def die_in_upload(checkpoints):
        upload, upload_file = checkpoints.uploads.upload, checkpoints.uploads.store._upload

        def upload_and_wait(path):
            upload(path)
            checkpoints.uploads.pending.result()  # a newer checkpoint would replace one that waits

        def upload_file_and_die(entry, folder):
            upload_file(entry, folder)
            if "00000009" in entry.path:
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoints.uploads.upload, checkpoints.uploads.store._upload = upload_and_wait, upload_file_and_die

    def store():
        return Store(uri)

    assert wait(start("first", store, die_in_upload)) == -signal.SIGKILL
    prefix = f"checkpoints/{RUN}/"
    assert Store(uri).names(prefix) == [f"{prefix}step-0000000{step}" for step in (3, 6)]
    for name in ("second", "first"):
        assert wait(start(name, store)) == 0
        assert tensors_sha256(read_tensors(tmp_path / f"{name}.safetensors")) == uninterrupted[0]
