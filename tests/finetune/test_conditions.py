"""Training of conditional models on latents, and checks of their data."""

import dataclasses

import numpy as np
import pytest
import torch

from stages.data.images import Conditions, Images, label_table, read_images, write_images
from stages.finetune.batches import Batches
from stages.finetune.checkpoint import Checkpoints
from stages.finetune.trainer import Trainer
from stages.models.checks import check_conditions
from stages.runtime.errors import InputError


def test_latents_and_conditions_survive_writing_and_reading(tmp_path, latents):
    """Values and types are the same; the latents are memory-mapped."""
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


def test_a_model_gets_the_condition_of_each_image(conditional, scheduler, latents, short_training):
    """The prediction equals a direct call with the rows of the table; other rows give another prediction."""
    trainer = Trainer(conditional, scheduler, latents, short_training(), 0)
    batch = trainer.batches.at(0, trainer.rows)
    found = trainer.distillation.predict(conditional, batch)
    noisy = scheduler.add_noise(batch.images, batch.noise, batch.timesteps)
    rows = torch.from_numpy(latents.conditions.table)[batch.labels]
    others = dataclasses.replace(batch, labels=(batch.labels + 1) % 4)

    assert torch.equal(batch.images, torch.from_numpy(latents.train[trainer.batches.choose(0)].astype(np.float32)))
    torch.testing.assert_close(found, conditional(noisy, batch.timesteps, encoder_hidden_states=rows).sample)
    assert not torch.allclose(found, trainer.distillation.predict(conditional, others))


def test_a_conditional_model_trains(conditional, scheduler, latents, tmp_path, short_training):
    """On float16 latents, its held-out loss falls."""
    trainer = Trainer(conditional, scheduler, latents, short_training(steps=30), 0)
    trainer.run(Checkpoints(tmp_path, "run"))

    assert trainer.curve[-1].heldout_loss < 0.8 * trainer.curve[0].heldout_loss


def test_label_dropout_replaces_conditions_by_the_empty_one(latents):
    """The empty condition is the last row of the table; all other labels stay."""
    batches = Batches(latents, 1000, 0, batch_size=24, flip=False, antithetic=True, label_dropout=0.25)
    shown = torch.cat([batches.at(step, slice(0, 24)).labels for step in range(40)])
    kept = [batches.at(step, slice(0, 24)).labels for step in range(3)]

    assert float((shown == 4).float().mean()) == pytest.approx(0.25, abs=0.05)
    for step, labels in enumerate(kept):
        expected = torch.from_numpy(latents.conditions.train[batches.choose(step)])
        assert bool(((labels == expected) | (labels == 4)).all())


def test_model_and_conditions_must_fit(conditional, unet, latents, tmp_path):
    """The widths are equal; an unconditional model has no conditions."""
    check_conditions(conditional, latents.conditions, tmp_path)
    check_conditions(unet, None, tmp_path)
    narrow = dataclasses.replace(latents.conditions, table=latents.conditions.table[..., :8])
    for model, found, message in (
        (conditional, None, "takes conditions of width 12, .* has none"),
        (conditional, narrow, "takes conditions of width 12, .* has conditions of width 8"),
        (unet, narrow, "takes no conditions, .* has conditions of width 8"),
    ):
        with pytest.raises(InputError, match=message):
            check_conditions(model, found, tmp_path)


@pytest.mark.parametrize(
    ("file", "array", "message"),
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
def test_damaged_data_is_refused(tmp_path, latents, file, array, message):
    """The message has the file and what is allowed."""
    write_images(tmp_path, latents, {})
    np.save(tmp_path / file, array)
    if file == "train.npy":
        np.save(tmp_path / "heldout.npy", array)

    with pytest.raises(InputError, match=message):
        read_images(tmp_path)


def test_latents_need_the_images_they_encode(tmp_path, latents):
    """FID compares with these images; there is one for each latent."""
    write_images(tmp_path, dataclasses.replace(latents, source_pixels=latents.pixels[1:]), {})
    with pytest.raises(InputError, match=r"pixels\.npy must hold the 24 images whose latents are in train\.npy"):
        read_images(tmp_path)


def test_without_an_empty_condition_no_image_gets_it(latents):
    """A row of zeros marks a table without one; the model never saw it."""
    conditions = dataclasses.replace(latents.conditions, table=latents.conditions.table.copy())
    conditions.table[-1] = 0
    images = dataclasses.replace(latents, conditions=conditions)
    batches = Batches(images, 1000, 0, batch_size=24, flip=False, antithetic=True, label_dropout=1.0)

    assert int(batches.at(0, slice(0, 24)).labels.max()) < 4


def test_latents_are_not_mirrored(latents):
    """An autoencoder gives a mirrored image other latents than the mirrored ones."""
    pixels = np.zeros((len(latents.train), 3, 16, 16), np.uint8)
    images = dataclasses.replace(latents, source_pixels=pixels)
    with pytest.raises(InputError, match=r"finetune\.flip is true, and mirrored latents are not .*; set it to false"):
        Batches(images, 1000, 0, batch_size=24, flip=True, antithetic=True, label_dropout=0.0)


def test_the_row_of_no_class_is_no_label(tmp_path, images):
    """A table without an empty class ends with a row that stands for none; the model has no such label."""
    labels = np.arange(len(images.train)) % 3
    conditions = Conditions(label_table(3, None), labels, labels[: len(images.heldout)])
    write_images(tmp_path, Images(images.train, images.heldout, conditions), {})
    assert len(read_images(tmp_path).conditions.table) == 4
    np.save(tmp_path / "train_labels.npy", np.where(labels == 2, 3, labels))

    with pytest.raises(InputError, match=r"train_labels\.npy does not hold .* from 0 to 2"):
        read_images(tmp_path)
