"""Calibration images that the model draws itself, anew at every timestep."""

import itertools

import pytest
import torch
from click.testing import CliRunner
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from ruamel.yaml import YAML

from stages.data.images import write_images
from stages.importance.__main__ import main
from stages.importance.calibration import calibrate, calibration_draws
from stages.importance.measure import measure_importance
from stages.importance.params import DrawParams, ImportanceParams
from stages.models.pipeline import write_pipeline
from stages.models.saliency import read_importance
from stages.runtime.errors import InputError
from stages.storage.tensors import tensors_sha256

CHOSEN = {
    "criterion": "taylor",
    "formula": "ldm",
    "threshold": 0.1,
    "num_images": 3,
    "stride": 400,
    "draw": {"steps": 4, "guidance": 3.0},
}


def chosen(**changes):
    """Params that draw three images in four steps at the timesteps 0, 400 and 800."""
    return ImportanceParams(**{**CHOSEN, **changes})


@pytest.fixture
def draws_of(conditional, scheduler, latents):
    """The draws of a seed and params."""

    def make(seed=0, **changes):
        return list(calibration_draws(conditional, scheduler, latents, chosen(**changes), seed))

    return make


def classes_of(batch, table):
    """Find the class of each image by its row of the table."""
    return [
        next(row for row, entry in enumerate(table) if torch.equal(torch.from_numpy(entry), condition))
        for condition in batch.condition["encoder_hidden_states"]
    ]


def test_equal_seeds_draw_the_same_and_every_timestep_draws_anew(draws_of):
    """Images, noise and all parts of a batch; another seed draws others."""
    (first,), (second,), (other,) = draws_of(0), draws_of(0), draws_of(1)
    batches = [first.at(0), first.at(1), other.at(0)]

    for name in ("images", "noise"):
        assert torch.equal(getattr(first.at(0), name), getattr(second.at(0), name))
        values = [getattr(batch, name) for batch in batches]
        assert not any(torch.equal(one, two) for one, two in itertools.combinations(values, 2))
        rows = torch.cat(values).flatten(1)
        assert len(rows.unique(dim=0)) == len(rows) == 9  # no image of any batch is repeated
    assert not torch.equal(first.at(0).images, first.at(0).noise)


def test_the_classes_of_a_timestep_are_distinct_and_change(draws_of, latents):
    """No image has the empty condition; over the timesteps every class occurs."""
    (draw,) = draws_of()
    table = latents.conditions.table
    found = [classes_of(draw.at(timestep), table) for timestep in range(8)]

    assert all(len(set(labels)) == 3 for labels in found)
    assert {label for labels in found for label in labels} == set(range(len(table) - 1))
    assert len({tuple(labels) for labels in found}) > 1


def test_the_images_are_those_of_ddim_with_guidance(draws_of, conditional, scheduler, latents):
    """The loop of diffusers over the same first noise, ε = ε(∅) + 3 (ε(c) − ε(∅)) (reference)."""
    (draw,) = draws_of()
    batch = draw.at(7)
    sampler = DDIMScheduler.from_config(scheduler.config, timestep_spacing="leading")
    sampler.set_timesteps(4)
    empty = torch.from_numpy(latents.conditions.table[-1]).expand(3, -1, -1)
    noises = [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in draw.seeds(7)]
    images = torch.stack(noises)
    with torch.no_grad():
        for step in sampler.timesteps:
            without, given = (
                conditional(images, step, encoder_hidden_states=states).sample
                for states in (empty, batch.condition["encoder_hidden_states"])
            )
            images = sampler.step(without + 3 * (given - without), step, images).prev_sample

    torch.testing.assert_close(batch.images, images, rtol=1e-4, atol=1e-4)


def test_batches_and_noises_are_different_draws(draws_of):
    """Noises of one batch share its images and classes; batches share nothing."""
    drawn = [draw.at(5) for draw in draws_of(batches=2, noises=2)]

    assert [torch.equal(drawn[0].images, one.images) for one in drawn] == [True, True, False, False]
    assert [torch.equal(drawn[0].noise, one.noise) for one in drawn] == [True, False, False, False]


@pytest.mark.parametrize("timesteps_per_pass", [1, 2])
def test_each_timestep_is_measured_on_its_own_images(draws_of, conditional, scheduler, latents, timesteps_per_pass):
    """The losses are those of a loop over the batches, also with several timesteps in a pass (reference)."""
    params = chosen(timesteps_per_pass=timesteps_per_pass)
    found = calibrate(conditional, scheduler, latents, params, 0)
    (draw,), losses = draws_of(), []
    for step in found.timesteps:
        batch, timesteps = draw.at(step), torch.full((3,), step)
        noisy = scheduler.add_noise(batch.images, batch.noise, timesteps)
        with torch.no_grad():
            predicted = conditional(noisy, timesteps, **batch.condition).sample
        losses.append(float((predicted - batch.noise).square().mean()))

    assert found.timesteps == [0, 400, 800]
    torch.testing.assert_close(found.losses, [losses], rtol=1e-3, atol=0)


def test_drawing_leaves_no_gradient(draws_of, conditional, scheduler):
    """The saliencies are those of the same batch given as tensors."""
    (draw,) = draws_of()
    options = {"criterion": "diff-pruning", "formula": "ldm", "label": None}
    drawn = measure_importance(conditional, scheduler, [draw], [400], **options)
    given = measure_importance(conditional, scheduler, [draw.at(400)], [400], **options)

    assert tensors_sha256(drawn.saliency) == tensors_sha256(given.saliency)


def test_an_unconditional_model_draws_without_classes(unet, scheduler, images):
    """Without guidance; the number of training images does not limit the number of images."""
    (draw,) = calibration_draws(unet, scheduler, images, chosen(draw={"steps": 2}, num_images=40), 0)
    batch = draw.at(3)

    assert batch.condition == {}
    assert batch.images.shape == (40, 1, 8, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images": 5}, r"num_images 5 is more than the 4 classes, and importance\.draw gives each image another"),
        ({"draw": {"steps": 7}}, r"importance\.draw\.steps 7 does not divide the 1000 timesteps of the model"),
    ],
)
def test_draws_that_cannot_be_made_are_refused_before_the_first(draws_of, changes, message):
    """With the number, the limit and the key."""
    with pytest.raises(InputError, match=message):
        draws_of(**changes)


def test_guidance_needs_a_model_with_conditions(unet, scheduler, images):
    """The message names the key and the value to set."""
    message = r"importance\.draw\.guidance is 3\.0, and the model takes no conditions; set it to null"
    with pytest.raises(InputError, match=message):
        calibration_draws(unet, scheduler, images, chosen(), 0)


def test_the_formula_ldm_needs_draw():
    """The original draws images anew; without the key nothing is drawn silently."""
    with pytest.raises(ValueError, match=r"formula ldm draws its images anew at every timestep; give draw, such as"):
        chosen(draw=None)
    assert chosen(formula="paper", draw=None).draw is None
    assert chosen(formula="paper").draw == DrawParams(steps=4, guidance=3.0)


def test_the_stage_measures_on_drawn_images(root, conditional, scheduler, latents, tmp_path, monkeypatch):
    """From the command line, twice with the same bits, with its diagnostics."""
    monkeypatch.chdir(tmp_path)
    write_pipeline(tmp_path / "model", conditional, scheduler)
    (tmp_path / "data").mkdir()
    write_images(tmp_path / "data", latents, {})
    tree = YAML(typ="safe").load((root / "params.yaml").read_text())
    tree["importance"] = {**CHOSEN, "report": {"timesteps": 2, "draws": 2}}
    YAML(typ="safe").dump(tree, tmp_path / "params.yaml")
    hashes = set()
    for name in ("one", "two"):
        folders = ["--out", name, "--report", f"{name}-report"]
        result = CliRunner().invoke(main, ["--model", "model", "--data", "data", *folders])
        assert result.exit_code == 0, result.output
        hashes.add(tensors_sha256(read_importance(tmp_path / name).saliency))

    assert len(hashes) == 1
    assert read_importance(tmp_path / "one").formula == "ldm"
