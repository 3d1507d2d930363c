"""Snapshots of a training, and the seconds that its steps took."""

import copy
import json
import time

import pytest
import torch
from pydantic import ValidationError

from stages.finetune.checkpoint import METADATA_KEY, Checkpoints
from stages.finetune.recovery import write
from stages.finetune.snapshots import Snapshots, TrainingClock
from stages.finetune.trainer import Trainer
from stages.runtime.environment import SHARED_VARIABLE
from stages.storage.files import read_json
from stages.storage.tensors import read_metadata, read_tensors, tensors_sha256, write_tensors

STEPS = (2, 3, 5)


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def trainer(unet, scheduler, images, short_training):
    """Return a function that builds the same trainer of six steps at every call."""

    def start(**changes):
        params = {"steps": 6, "ema_decays": (0.1, 0.9), "checkpoint_every": 2, "snapshots": STEPS} | changes
        return Trainer(copy.deepcopy(unet), scheduler, images, short_training(**params), 0)

    return start


def hashes(run):
    """Hash the weights of each snapshot and of the result."""
    found = {step: tensors_sha256(weights) for step, weights in run.snapshots.weights.items()}
    return {**found, "best": tensors_sha256(run.best_ema.state_dict())}


def test_a_snapshot_is_the_best_ema_at_its_step(trainer, tmp_path):
    """That is the one with the lowest held-out loss there; the training itself is the same without snapshots."""
    run, plain = trainer(), trainer(snapshots=())
    taken, step = {}, run.step

    def step_and_copy():
        step()
        taken[run.steps_done] = {decay: tensors_sha256(it.state_dict()) for decay, it in run.ema_models.models.items()}

    run.step = step_and_copy
    run.run(Checkpoints(tmp_path / "with", "run"))
    plain.run(Checkpoints(tmp_path / "without", "run"))
    best = {point.step: point.ema_decay for point in run.curve}

    assert {key: it for key, it in hashes(run).items() if key in STEPS} == {it: taken[it][best[it]] for it in STEPS}
    assert len(set(hashes(run).values())) == len(STEPS) + 1
    assert hashes(plain) == {"best": hashes(run)["best"]}
    assert [point.step for point in run.curve] == [0, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "killed_at", [pytest.param(1, marks=pytest.mark.e2e), 3, pytest.param(5, marks=pytest.mark.e2e)]
)
def test_a_resumed_training_has_the_same_snapshots(trainer, tmp_path, killed_at):
    """Bit for bit, those before the last checkpoint and those after it; each step counts once in the seconds."""
    whole, killed, resumed = trainer(), trainer(), trainer()
    whole.run(Checkpoints(tmp_path / "whole", "run"))
    step = killed.step

    def step_or_die():
        if killed.steps_done == killed_at:
            raise KilledError
        step()

    killed.step = step_or_die
    with pytest.raises(KilledError):
        killed.run(Checkpoints(tmp_path / "killed", "run"))
    saved = Checkpoints(tmp_path / "killed", "run").newest()
    resumed.run(Checkpoints(tmp_path / "killed", "run"))

    assert hashes(resumed) == hashes(whole)
    assert [*resumed.clock.by_step] == [*whole.clock.by_step] == list(STEPS)
    before = {step: it for step, it in killed.clock.by_step.items() if saved and step <= saved.step}
    assert {step: resumed.clock.by_step[step] for step in before} == before
    times = [*resumed.clock.by_step.values(), resumed.clock.seconds]
    assert 0 < times[0] < times[1] < times[2] < times[3]


@pytest.mark.parametrize(
    ("first", "second", "alone", "machine"),
    [
        ("one", "one", True, "one"),
        ("one, shared", "one", False, "one"),
        ("one", "one, shared", False, "one"),
        ("one", "two", True, ""),
    ],
)
def test_a_resumed_clock_knows_of_every_process(
    trainer, model_folder, tmp_path, monkeypatch, first, second, alone, machine
):
    """Steps beside other runs before a restart count as those after it; of several machines no seconds are written."""
    for place, steps in ((first, 3), (second, 6)):
        monkeypatch.delenv(SHARED_VARIABLE, raising=False)
        if "shared" in place:
            monkeypatch.setenv(SHARED_VARIABLE, "1")
        run = trainer()
        run.clock.machine = place.partition(",")[0]
        monkeypatch.setattr(run, "_remaining_steps", lambda run=run, steps=steps: range(run.steps_done, steps))
        run.run(Checkpoints(tmp_path, "run"))

    write(run, model_folder, tmp_path / "out", tmp_path / "report")
    cost = read_json(tmp_path / "out.provenance.json")["cost"]

    assert [*run.clock.by_step] == list(STEPS)
    assert (run.clock.alone, run.clock.machine) == (alone, machine)
    assert (cost["alone"], len(cost["seconds_by_step"])) == (alone, 4 if machine else 0)


def test_a_checkpoint_from_before_the_clock_knew_its_machine_counts_as_disturbed(trainer, tmp_path):
    """It still resumes; nothing says where its steps were taken, nor beside what."""
    trainer().run(Checkpoints(tmp_path, "run"))
    path = max(tmp_path.rglob("*.safetensors"))
    metadata = json.loads(read_metadata(path)[METADATA_KEY])
    older = {key: value for key, value in metadata.items() if key not in ("machine", "alone")}
    write_tensors(path, read_tensors(path), {METADATA_KEY: json.dumps(older)})
    run = trainer()
    run.run(Checkpoints(tmp_path, "run"))

    assert {"machine", "alone"} < metadata.keys()
    assert run.steps_done == 6
    assert (run.clock.alone, run.clock.machine) == (False, "")


def test_the_clock_counts_steps_alone(trainer, tmp_path, monkeypatch):
    """A second of measuring and one of saving do not count; the last step's total is that of the whole training."""
    run, now = trainer(snapshots=(2, 4)), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def taking(seconds, function):
        def call(*given):
            now[0] += seconds
            return function(*given)

        return call

    run.step = taking(1, run.step)
    run.heldout_loss = taking(100, run.heldout_loss)
    checkpoints = Checkpoints(tmp_path, "run")
    checkpoints.save = taking(1000, checkpoints.save)
    run.run(checkpoints)

    assert run.clock.by_step == {2: 2, 4: 4}
    assert run.clock.seconds == 6


def test_a_clock_that_stands_stays(monkeypatch):
    """Starting twice counts once, and stopping twice adds nothing."""
    now = iter([1.0, 4.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = TrainingClock(seconds=10)
    for _ in range(2):
        clock.start()
    for _ in range(2):
        clock.stop()

    assert clock.seconds == 13


def test_tensors_bring_back_every_snapshot(unet):
    """Other tensors of a checkpoint are left alone, and a model is built for each step in order."""
    snapshots, loaded = Snapshots(), Snapshots()
    models = {10: copy.deepcopy(unet), 9: unet}
    with torch.no_grad():
        models[10].conv_in.weight.add_(1)
    for step, model in models.items():
        snapshots.take(step, model)
    loaded.load({**snapshots.to_tensors(), "unet.conv_in.weight": torch.zeros(1)})
    found = [(step, tensors_sha256(model.state_dict())) for step, model in loaded.models(unet)]

    assert found == [(step, tensors_sha256(models[step].state_dict())) for step in (9, 10)]


@pytest.mark.parametrize("steps", [(3, 2), (2, 2), (4,), (5,), (0,)])
def test_snapshots_rise_below_the_last_step(short_training, steps):
    """The last step's model is the result itself."""
    message = "greater than or equal to 1" if steps == (0,) else "must rise and stay below steps 4, whose model is the"
    with pytest.raises(ValidationError, match=message):
        short_training(snapshots=steps)
    assert short_training(snapshots=(1, 3)).snapshots == (1, 3)
