"""Snapshots of a training, and the seconds that its steps took."""

import copy
import time

import pytest
import torch
from pydantic import ValidationError

from stages.finetune.checkpoint import Checkpoints
from stages.finetune.snapshots import Snapshots, TrainingClock
from stages.finetune.trainer import Trainer
from stages.storage.tensors import tensors_sha256

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
