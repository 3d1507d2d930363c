"""Conditional models, latents, and what does not belong together."""

import dataclasses

import numpy as np
import pytest
import torch

from stages.data.images import read_images, write_images
from stages.finetune.batches import Batches
from stages.finetune.checkpoint import Checkpoints
from stages.finetune.params import FinetuneParams
from stages.finetune.trainer import Trainer
from stages.models.checks import check_conditions
from stages.runtime.errors import InputError

PARAMS = FinetuneParams(
    steps=4,
    batch_size=8,
    learning_rate=1e-3,
    ema_decays=(0.9,),
    clip_norm=1.0,
    flip=False,
    heldout_images=8,
    heldout_every=4,
    checkpoint_every=4,
)


def test_latents_and_conditions_come_back_as_they_were(tmp_path, latents):
    """Memory-mapped, of the same types."""
    write_images(tmp_path, latents, {})
    found = read_images(tmp_path)

    assert isinstance(found.train, np.memmap)
    for mine, theirs in (
        (found.train, latents.train),
        (found.conditions.table, latents.conditions.table),
        (found.conditions.heldout, latents.conditions.heldout),
    ):
        assert mine.dtype == theirs.dtype
        assert np.array_equal(mine, theirs)


def test_a_model_is_told_the_condition_of_each_image(conditional, scheduler, latents):
    """What it predicts is that of its own call with the rows of the table; another row is another prediction."""
    trainer = Trainer(conditional, scheduler, latents, PARAMS, 0)
    batch = trainer.batches.at(0, trainer.share)
    found = trainer.distillation.predict(conditional, batch)
    noisy = scheduler.add_noise(batch.images, batch.noise, batch.timesteps)
    rows = torch.from_numpy(latents.conditions.table)[batch.labels]
    others = dataclasses.replace(batch, labels=(batch.labels + 1) % 4)

    assert torch.equal(batch.images, torch.from_numpy(latents.train[trainer.batches.choose(0)].astype(np.float32)))
    torch.testing.assert_close(found, conditional(noisy, batch.timesteps, encoder_hidden_states=rows).sample)
    assert not torch.allclose(found, trainer.distillation.predict(conditional, others))


def test_a_conditional_model_trains(conditional, scheduler, latents, tmp_path):
    """To the end, on latents of float16, and its held-out loss falls."""
    trainer = Trainer(conditional, scheduler, latents, PARAMS.model_copy(update={"steps": 30}), 0)
    trainer.run(Checkpoints(tmp_path, "run"))

    assert trainer.curve[-1].heldout_loss < 0.8 * trainer.curve[0].heldout_loss


def test_a_share_of_the_conditions_is_left_out(latents):
    """The last row of the table stands for none."""
    params = FinetuneParams(**{**dict(PARAMS), "label_dropout": 0.25, "batch_size": 24})
    batches = Batches(latents, 1000, params, 0)
    shown = torch.cat([batches.at(step, slice(0, 24)).labels for step in range(40)])
    kept = [batches.at(step, slice(0, 24)).labels for step in range(3)]

    assert float((shown == 4).float().mean()) == pytest.approx(0.25, abs=0.05)
    for step, labels in enumerate(kept):
        expected = torch.from_numpy(latents.conditions.train[batches.choose(step)])
        assert bool(((labels == expected) | (labels == 4)).all())


def test_model_and_conditions_must_fit(conditional, unet, latents, tmp_path):
    """Of the same width, and none for a model that takes none."""
    check_conditions(conditional, latents.conditions, tmp_path)
    check_conditions(unet, None, tmp_path)
    narrow = dataclasses.replace(latents.conditions, table=latents.conditions.table[..., :8])
    for model, found, words in (
        (conditional, None, "takes conditions of width 12, .* has none"),
        (conditional, narrow, "takes conditions of width 12, .* has conditions of width 8"),
        (unet, narrow, "takes no conditions, .* has conditions of width 8"),
    ):
        with pytest.raises(InputError, match=words):
            check_conditions(model, found, tmp_path)


@pytest.mark.parametrize(
    ("file", "array", "words"),
    [
        ("conditions.npy", np.zeros((2, 3)), r"is not a condition table, float32 \[K, S, D\]"),
        (
            "train_labels.npy",
            np.zeros(3, np.int64),
            r"train_labels\.npy does not hold a row .* int64 \[24\] from 0 to 4",
        ),
        ("heldout_labels.npy", np.full(8, 5), r"heldout_labels\.npy does not hold a row"),
        ("train.npy", np.zeros((4, 3, 8, 8), np.float64), r"holds no packed images, uint8 \[N, C, H, W\] \(float64\)"),
    ],
)
def test_damaged_data_is_refused(tmp_path, latents, file, array, words):
    """By name, with what is allowed."""
    write_images(tmp_path, latents, {})
    np.save(tmp_path / file, array)
    if file == "train.npy":
        np.save(tmp_path / "heldout.npy", array)

    with pytest.raises(InputError, match=words):
        read_images(tmp_path)


def test_latents_need_their_pictures(tmp_path, latents):
    """FID is taken against them, one for each latent."""
    write_images(tmp_path, dataclasses.replace(latents, source_pixels=latents.pixels[1:]), {})
    with pytest.raises(InputError, match=r"pixels\.npy must hold the 24 images whose latents are in train\.npy"):
        read_images(tmp_path)
