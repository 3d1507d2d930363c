"""Class labels and a learned variance in sampling: labels, guidance, and what each sampler takes of the output."""

import dataclasses
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from stages.data.images import NO_LABEL, Conditions, has_empty, label_table, read_images, write_images
from stages.fetch.class_embedding import read_class_embedding
from stages.finetune.batches import Batches
from stages.models.checks import check_conditions
from stages.models.layout import CLASS_EMBEDDING, WEIGHTS
from stages.models.params import SamplerParams, SchedulerName
from stages.models.samplers import make_sampler, takes_variance
from stages.models.sampling import (
    SamplingContext,
    check_guidance,
    check_variance,
    draw,
    initial_noise,
    predictor,
    trajectory,
)
from stages.runtime.errors import InputError
from stages.storage.files import write_json
from stages.storage.tensors import write_tensors

LEARNED = {"variance_type": "learned_range"}
LABELLED = SamplingContext(table=label_table(4, 4))


@pytest.fixture
def labelled(make_unet):
    """A UNet with five labels, of which the last is the empty class, and a learned variance."""
    return make_unet(num_class_embeds=5, out_channels=2)


def reverse_steps(unet, scheduler, seeds, labels, timesteps):
    """Ancestral sampling with log σ² = f log β + (1 − f) log β̃, f = (v + 1) / 2 (Nichol and Dhariwal, 2021, eq. 15)."""
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    images, alphas = initial_noise(unet, draws), torch.cat([scheduler.alphas_cumprod, torch.ones(1)])
    for current, following in zip(timesteps, [*timesteps[1:], -1], strict=True):
        with torch.no_grad():
            noise, variance = unet(images, current, class_labels=torch.tensor(labels)).sample.chunk(2, dim=1)
        now, then = alphas[current], alphas[following]
        beta = 1 - now / then
        clean = ((images - (1 - now).sqrt() * noise) / now.sqrt()).clamp(-1, 1)
        mean = then.sqrt() * beta / (1 - now) * clean + (now / then).sqrt() * (1 - then) / (1 - now) * images
        if current == 0:
            return mean
        share, smallest = (variance + 1) / 2, beta * (1 - then) / (1 - now)
        deviation = (0.5 * (share * beta.log() + (1 - share) * smallest.log())).exp()
        fresh = torch.stack([torch.randn(images.shape[1:], generator=one) for one in draws])
        images = mean + deviation * fresh
    return images


def test_ddpm_takes_the_learned_variance(labelled):
    """Four steps equal the formula of the learned range, written out; another variance gives another image."""
    scheduler = DDPMScheduler(**LEARNED)
    params = SamplerParams(scheduler="DDPM", steps=4)
    *_, found = trajectory(labelled, make_sampler(scheduler, params), [7, 8], context=LABELLED, labels=[1, 3])
    found = found.detach()
    expected = reverse_steps(labelled, scheduler, [7, 8], [1, 3], [750, 500, 250, 0])

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        labelled.conv_out.bias[1] += 1
    *_, other = trajectory(labelled, make_sampler(scheduler, params), [7, 8], context=LABELLED, labels=[1, 3])
    assert not torch.allclose(other, found, atol=1e-3)


@pytest.mark.parametrize("name", get_args(SchedulerName))
def test_all_samplers_but_ddpm_leave_the_variance_out(labelled, name):
    """Each draws as with a fixed variance, of the first half alone; DDPM does so where the schedule has none."""
    with torch.no_grad():
        half = torch.nn.Conv2d(16, 1, 3, padding=1)
        half.weight.copy_(labelled.conv_out.weight[:1])
        half.bias.copy_(labelled.conv_out.bias[:1])
    params = SamplerParams(scheduler=name, steps=4, spacing="leading")
    schedule = {} if name == "DDPM" else LEARNED
    whole = draw(
        labelled, DDPMScheduler(**schedule), [1, 2], params, batch_size=2, label="", context=LABELLED, labels=[0, 2]
    )
    labelled.conv_out = half
    labelled.register_to_config(out_channels=1)
    alone = draw(labelled, DDPMScheduler(), [1, 2], params, batch_size=2, label="", context=LABELLED, labels=[0, 2])

    assert np.array_equal(whole, alone)
    assert takes_variance(make_sampler(DDPMScheduler(**LEARNED), params)) == (name == "DDPM")


def test_ddim_steps_are_those_of_diffusers_on_the_first_half(labelled):
    """As diffusers' own DDIMScheduler draws from ε."""
    theirs = DDIMScheduler()
    theirs.set_timesteps(4)
    images = initial_noise(labelled, [torch.Generator().manual_seed(5)])
    for timestep in theirs.timesteps:
        with torch.no_grad():
            output = labelled(images, timestep, class_labels=torch.tensor([2])).sample
        images = theirs.step(output[:, :1], timestep, images).prev_sample
    sampler = make_sampler(DDPMScheduler(**LEARNED), SamplerParams(steps=4))
    *_, found = trajectory(labelled, sampler, [5], context=LABELLED, labels=[2])

    torch.testing.assert_close(found.detach(), images, rtol=1e-5, atol=1e-5)


def test_dpm_solver_keeps_all_channels_of_a_latent():
    """With learned_range diffusers' DPMSolverMultistep would take the first three channels of any output."""
    sampler = make_sampler(DDPMScheduler(**LEARNED), SamplerParams(scheduler="DPMSolverMultistep", steps=4))
    theirs = DPMSolverMultistepScheduler(timestep_spacing="leading")
    theirs.set_timesteps(4)
    images, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found, expected = (it.step(noise, it.timesteps[0], images).prev_sample for it in (sampler, theirs))

    assert torch.equal(found, expected)


def test_the_variance_is_that_of_the_class_and_is_not_guided(labelled):
    """ε is guided by the formula; the second half is that of the conditional pass, without and with guidance."""
    images, timestep = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    guided = dataclasses.replace(LABELLED, guidance=3.0)
    with torch.no_grad():
        empty, own = (labelled(images, timestep, class_labels=torch.tensor(it)).sample for it in ([4, 4], [1, 3]))
        found = predictor(labelled, guided, [1, 3])(images, timestep)
        plain = predictor(labelled, LABELLED, [1, 3])(images, timestep)

    torch.testing.assert_close(plain, own)
    torch.testing.assert_close(found[:, 1:], own[:, 1:])
    torch.testing.assert_close(found[:, :1], empty[:, :1] + 3 * (own - empty)[:, :1])


def test_a_step_that_would_leave_noise_in_the_images_is_refused():
    """Diffusers adds the learned variance's noise at every timestep above 0, which trailing steps end at."""
    trailing = SamplerParams(scheduler="DDPM", steps=4, spacing="trailing")
    with pytest.raises(InputError, match="end at timestep 249, where a learned variance adds noise") as caught:
        make_sampler(DDPMScheduler(**LEARNED), trailing)
    assert "\n" not in caught.value.message
    make_sampler(DDPMScheduler(**LEARNED), SamplerParams(scheduler="DDPM", steps=4, spacing="linspace"))
    make_sampler(DDPMScheduler(**LEARNED), SamplerParams(steps=4, spacing="trailing"))


@pytest.mark.parametrize("variance", ["fixed_large", "fixed_large_log", "fixed_small"])
def test_the_large_variance_leaves_noise_as_well(variance):
    """Its last step adds 1 − ᾱ from any timestep but 0; that of the small one is nearly 0."""
    scheduler = DDPMScheduler(variance_type=variance)
    trailing = SamplerParams(scheduler="DDPM", steps=50, spacing="trailing")
    if variance == "fixed_small":
        make_sampler(scheduler, trailing)
    else:
        with pytest.raises(InputError, match=f"end at timestep 19, where the variance {variance} adds noise"):
            make_sampler(scheduler, trailing)
    make_sampler(scheduler, SamplerParams(scheduler="DDPM", steps=50))
    make_sampler(scheduler, SamplerParams(steps=50, spacing="trailing"))


def test_a_schedule_with_a_variance_needs_a_model_with_one(unet, labelled, scheduler):
    """Otherwise it is refused, also while drawing."""
    learned = DDPMScheduler(**LEARNED)
    check_variance(labelled, learned, "model")
    check_variance(labelled, scheduler, "model")
    with pytest.raises(
        InputError, match="model has variance_type learned_range, and its out_channels hold no variance"
    ):
        check_variance(unet, learned, "model")
    with pytest.raises(InputError, match="out_channels hold no variance"):
        draw(unet, learned, [1], SamplerParams(scheduler="DDPM", steps=4), batch_size=1, label="")


def test_guidance_needs_an_empty_class():
    """Label 0 can be it; without one, guidance is refused in one line."""
    assert has_empty(label_table(4, 0))
    assert not has_empty(label_table(4, None))
    check_guidance(label_table(4, 4), 2.0, "reference", "the model")
    check_guidance(label_table(4, None), 1.0, "reference", "the model")
    with pytest.raises(InputError, match=r"reference\.guidance is 2\.0, and the model has no empty condition"):
        check_guidance(label_table(4, None), 2.0, "reference", "the model")


def test_the_empty_class_is_named_beside_the_model(labelled, tmp_path):
    """Without a file all labels are classes; with one, some are, and one may be the empty class."""
    assert read_class_embedding(labelled, tmp_path).tolist() == [0, 1, 2, 3, 4, NO_LABEL]
    write_json(tmp_path / CLASS_EMBEDDING / "config.json", {"num_classes": 4, "unconditional": 4})
    assert read_class_embedding(labelled, tmp_path).tolist() == [0, 1, 2, 3, 4]
    for config in (
        {"num_classes": 6},
        {"num_classes": 4, "unconditional": 5},
        {"num_classes": 4, "unconditional": 3},
        {},
    ):
        write_json(tmp_path / CLASS_EMBEDDING / "config.json", config)
        with pytest.raises(
            InputError, match=r"has 5 rows, but num_classes .* in its config\.json; allowed: 1 to 5 classes"
        ):
            read_class_embedding(labelled, tmp_path)
    write_json(tmp_path / CLASS_EMBEDDING / "config.json", {"num_classes": 4, "uncond": 4})
    with pytest.raises(InputError, match=r"has uncond in config\.json; it may hold .* num_classes and unconditional"):
        read_class_embedding(labelled, tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / CLASS_EMBEDDING).write_text("x")
    with pytest.raises(InputError, match="class_embedding is no folder; it may hold"):
        read_class_embedding(labelled, tmp_path / "other")
    write_tensors(tmp_path / CLASS_EMBEDDING / WEIGHTS, {"weight": torch.zeros(5, 64)})
    with pytest.raises(InputError, match="holds weights, but the model embeds its classes itself"):
        read_class_embedding(labelled, tmp_path)


def test_labels_survive_writing_and_must_fit_the_model(labelled, unet, conditional, images, latents, tmp_path):
    """A model with labels takes none that it has no row for, and no embeddings; others take no labels."""
    conditions = Conditions(label_table(4, 4), np.arange(24) % 4, np.arange(8) % 4)
    write_images(tmp_path, dataclasses.replace(images, conditions=conditions), {})
    found = read_images(tmp_path).conditions

    assert found.table.dtype == np.int64
    assert found.table.tolist() == [0, 1, 2, 3, 4]
    check_conditions(labelled, found, tmp_path)
    many = dataclasses.replace(found, table=label_table(6, None))
    for model, wrong, message in (
        (labelled, None, "takes labels below 5, .* has none"),
        (labelled, many, "takes labels below 5, .* has labels up to 5"),
        (labelled, latents.conditions, "takes labels below 5, .* has conditions of width 12"),
        (unet, found, "takes no conditions, .* has labels up to 4"),
        (conditional, found, "takes conditions of width 12, .* has labels up to 4"),
    ):
        with pytest.raises(InputError, match=message):
            check_conditions(model, wrong, tmp_path)


@pytest.mark.parametrize("empty", [4, None])
def test_labels_are_dropped_only_for_an_empty_class(images, empty):
    """Without one, every image keeps its class."""
    conditions = Conditions(label_table(4, empty), np.arange(24) % 4, np.arange(8) % 4)
    labelled = dataclasses.replace(images, conditions=conditions)
    batches = Batches(labelled, 1000, 0, batch_size=24, flip=False, antithetic=True, label_dropout=0.5)
    shown = torch.cat([batches.at(step, slice(0, 24)).labels for step in range(10)])

    assert float((shown == 4).float().mean()) == pytest.approx(0.5 if empty else 0, abs=0.1)
