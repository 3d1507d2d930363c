"""Trainings that are killed with SIGKILL, at moments of chance and at the worst ones."""

import copy
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
)


@pytest.fixture
def start(unet, scheduler, images, tmp_path):
    """Start a training in a process of its own; `meddle` is called in it before it begins."""

    def begin(name, store=None, meddle=None):
        ready, tell = os.pipe()
        if child := os.fork():
            os.read(ready, 1)
            return child
        code = 1
        try:
            torch.set_num_threads(1)
            trainer = Trainer(copy.deepcopy(unet), scheduler, images, PARAMS, 0)
            kept = Checkpoints(tmp_path / name, RUN, store() if store else None)
            if meddle:
                meddle(kept)
            os.write(tell, b"!")
            trainer.run(kept)
            models = {"unet": trainer.unet} | {str(key): model for key, model in trainer.ema_models.models.items()}
            states = {
                f"{key}.{part}": tensor for key, model in models.items() for part, tensor in model.state_dict().items()
            }
            write_tensors(tmp_path / f"{name}.safetensors", states)
            code = 0
        except BaseException:  # noqa: BLE001  # nothing of the child may reach pytest
            traceback.print_exc()
        finally:
            os._exit(code)
        return None

    return begin


@pytest.fixture
def undisturbed(start, tmp_path):
    """The hash of all weights of a training that nobody killed, and the seconds it took."""
    child, begin = start("undisturbed"), time.monotonic()
    assert os.waitpid(child, 0)[1] == 0
    return tensors_sha256(read_tensors(tmp_path / "undisturbed.safetensors")), time.monotonic() - begin


def end(child):
    """Wait for a process: the signal that ended it, or 0."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_twenty_kills_at_random_moments_change_no_bit(start, undisturbed, tmp_path):
    """Each training is killed once and started again; weights and averages are those of the undisturbed one."""
    expected, seconds = undisturbed
    moments = random.Random(0)
    killed = halves = 0
    for trial in range(20):
        name = f"trial-{trial}"
        child = start(name)
        time.sleep(moments.uniform(0, 0.9 * seconds))
        os.kill(child, signal.SIGKILL)
        killed += end(child) == -signal.SIGKILL
        halves += bool(list((tmp_path / name).glob("*/.*")))
        assert end(start(name)) == 0
        assert tensors_sha256(read_tensors(tmp_path / f"{name}.safetensors")) == expected, trial
    print(f"{killed} of 20 were killed in time, {halves} of them while a checkpoint was written")
    assert killed >= 15


def test_a_kill_within_the_writing_of_a_checkpoint_leaves_the_one_before(start, undisturbed, tmp_path, monkeypatch):
    """The file is there by halves, under another name that nobody reads."""

    def die_in_writing(kept):
        def fsync(_):
            if list(kept.folder.glob("step-*")):
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr("os.fsync", fsync)

    assert end(start("killed", meddle=die_in_writing)) == -signal.SIGKILL
    (folder,) = (tmp_path / "killed").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        ".step-00000006.safetensors.part",
        "step-00000003.safetensors",
    ]
    assert end(start("killed")) == 0
    assert tensors_sha256(read_tensors(tmp_path / "killed.safetensors")) == undisturbed[0]


def test_a_kill_within_an_upload_loses_nothing(start, undisturbed, tmp_path, connect):
    """Another machine goes on from the newest copy that is whole, this one from its own checkpoint."""
    uri = connect().uri

    def die_in_upload(kept):
        offer, upload = kept.uploads.offer, kept.uploads.store._upload

        def offer_and_wait(path):
            offer(path)
            kept.uploads.waiting.result()  # a newer checkpoint would take the place of one that waits

        def upload_and_die(entry, folder):
            upload(entry, folder)
            if "00000009" in entry.path:
                os.kill(os.getpid(), signal.SIGKILL)

        kept.uploads.offer, kept.uploads.store._upload = offer_and_wait, upload_and_die

    def store():
        return Store(uri)

    assert end(start("here", store, die_in_upload)) == -signal.SIGKILL
    prefix = f"checkpoints/{RUN}/"
    assert Store(uri).names(prefix) == [f"{prefix}step-0000000{step}" for step in (3, 6)]
    for name in ("elsewhere", "here"):
        assert end(start(name, store)) == 0
        assert tensors_sha256(read_tensors(tmp_path / f"{name}.safetensors")) == undisturbed[0]
