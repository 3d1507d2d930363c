"""Recovery by training."""

import copy
import math

import pytest
import torch

from stages.artifacts import Images, tensors_sha256
from stages.errors import InputError
from stages.finetune.checkpoint import Checkpoints
from stages.finetune.loss import NoiseLoss
from stages.finetune.trainer import Trainer
from stages.params import FinetuneParams

PARAMS = FinetuneParams(
    steps=7,
    batch_size=8,
    learning_rate=1e-3,
    ema_decay=0.9,
    clip_norm=1.0,
    flip=True,
    heldout_images=8,
    heldout_every=3,
    checkpoint_every=2,
)


@pytest.fixture
def trainer(unet, scheduler, images):
    """Start the same training, as often as wanted; keywords change its params."""

    def start(seed=0, **changes):
        return Trainer(copy.deepcopy(unet), scheduler, images, PARAMS.model_copy(update=changes), seed)

    return start


class KilledError(Exception):
    """The machine went away."""


def test_the_loss_is_the_mean_squared_error_of_the_noise(unet, scheduler):
    """By hand on x_t = √ᾱ x_0 + √(1 − ᾱ) ε (Ho et al., 2020, eq. 4)."""
    draws = torch.Generator().manual_seed(0)
    images, loss = torch.randn(4, 1, 8, 8, generator=draws), NoiseLoss(scheduler)
    noise, timesteps = loss.draw(images, draws)
    alpha = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    predicted = unet(alpha.sqrt() * images + (1 - alpha).sqrt() * noise, timesteps).sample

    torch.testing.assert_close(loss(unet, images, noise, timesteps), (predicted - noise).pow(2).mean((1, 2, 3)))


def test_training_lowers_the_heldout_loss(trainer, tmp_path):
    """Some steps on a fresh model help, and the curve holds every measurement."""
    run = trainer(steps=30, heldout_every=10)
    run.run(Checkpoints(tmp_path, "run"))

    assert [point.step for point in run.curve] == [0, 10, 20, 30]
    assert run.curve[0].train_loss is None
    assert run.curve[-1].heldout_loss < 0.8 * run.curve[0].heldout_loss


@pytest.mark.parametrize("killed_at", [1, 2, 3, 4, 5, 6])
def test_a_killed_training_goes_on_as_if_nothing_had_happened(trainer, tmp_path, killed_at):
    """Weights, average and curve are bit-identical to those of the undisturbed run, wherever it was killed."""
    undisturbed = trainer()
    undisturbed.run(Checkpoints(tmp_path / "undisturbed", "run"))
    killed = trainer()
    step = killed.step

    def step_or_die():
        if killed.done == killed_at:
            raise KilledError
        step()

    killed.step = step_or_die
    with pytest.raises(KilledError):
        killed.run(Checkpoints(tmp_path / "killed", "run"))
    resumed, steps = trainer(), []
    step_again = resumed.step
    resumed.step = lambda: (steps.append(resumed.done), step_again())
    resumed.run(Checkpoints(tmp_path / "killed", "run"))

    assert steps == list(range(killed_at // 2 * 2, 7))  # from the last checkpoint, and not from the start
    for part in ("unet", "ema"):
        states = [tensors_sha256(getattr(run, part).state_dict()) for run in (undisturbed, resumed)]
        assert states[0] == states[1]
    assert resumed.curve == undisturbed.curve


def test_another_seed_is_another_training(trainer, tmp_path):
    """Order, noise and timesteps all come from the seed."""
    runs = [trainer(seed) for seed in (0, 0, 1)]
    for index, run in enumerate(runs):
        run.run(Checkpoints(tmp_path / str(index), "run"))
    hashes = [tensors_sha256(run.ema.state_dict()) for run in runs]

    assert hashes[0] == hashes[1] != hashes[2]


def test_an_epoch_sees_every_image_once(trainer, images):
    """Three batches of eight are the 24 training images, in an order of their own each time round."""
    run = trainer(flip=False)
    epochs = []
    for _ in range(2):
        batches = []
        for _ in range(3):
            batches.append(run._batch(torch.Generator()))
            run.done += 1
        epochs.append(torch.cat(batches))

    expected = torch.from_numpy(images.train).float() / 127.5 - 1
    for epoch in epochs:
        assert sorted(map(str, epoch.flatten(1).tolist())) == sorted(map(str, expected.flatten(1).tolist()))
    assert not torch.equal(*epochs)


def test_the_average_follows_by_hand(trainer):
    """After one step with ramp (1 + 1) / (10 + 1): ema = d·before + (1 − d)·after."""
    run = trainer()
    before = run.unet.conv_in.weight.clone()
    run.step()

    decay = 2 / 11
    expected = decay * before + (1 - decay) * run.unet.conv_in.weight
    torch.testing.assert_close(run.ema.conv_in.weight.data, expected.data)


def test_a_damaged_checkpoint_is_never_read(trainer, tmp_path, capsys):
    """The one before is taken, and the user is told."""
    checkpoints = Checkpoints(tmp_path, "run")
    run = trainer()
    for _ in range(4):
        run.step()
        checkpoints.save(run.checkpoint())
    newest = max(checkpoints.folder.iterdir())
    newest.write_bytes(newest.read_bytes()[:-100])

    assert [path.name for path in sorted(checkpoints.folder.iterdir())] == [
        "step-00000003.safetensors",
        "step-00000004.safetensors",
    ]
    assert checkpoints.newest().step == 3
    assert "going back to the checkpoint before" in capsys.readouterr().err


def test_checkpoints_of_another_run_are_not_touched(trainer, tmp_path):
    """Each run sees its own."""
    run = trainer()
    run.step()
    Checkpoints(tmp_path, "a" * 64).save(run.checkpoint())

    assert Checkpoints(tmp_path, "b" * 64).newest() is None
    Checkpoints(tmp_path, "b" * 64).clear()
    assert Checkpoints(tmp_path, "a" * 64).newest().step == 1


def test_a_loss_that_is_not_finite_ends_the_training(images, scheduler, unet):
    """At once, naming the step and the key to change."""
    with torch.no_grad():
        unet.conv_in.weight.fill_(math.nan)
    run = Trainer(unet, scheduler, images, PARAMS, 0)

    with pytest.raises(InputError, match=r"the loss is nan at step 0; lower finetune\.learning_rate"):
        run.step()


def test_a_batch_larger_than_the_data_is_refused(trainer, images):
    """Both numbers and the key to change."""
    assert isinstance(images, Images)
    with pytest.raises(InputError, match=r"finetune\.batch_size 25 is more than the 24 training images"):
        trainer(batch_size=25)
