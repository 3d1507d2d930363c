"""Drawing images."""

from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from pydantic import ValidationError

from stages.models.params import SamplerParams, SchedulerName
from stages.models.sampling import QuadraticDdim, draw, draw_strip, image_seeds, initial_noise, make_sampler
from stages.runtime.errors import InputError

FOUR = SamplerParams(steps=4)


def pictures(unet, scheduler, seeds, sampler=FOUR, batch_size=8, **options):
    """Draw without a label."""
    return draw(unet, scheduler, seeds, sampler, batch_size=batch_size, label="", **options)


@pytest.mark.parametrize("scheduler_name", get_args(SchedulerName))
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_batching_does_not_change_a_picture(unet, scheduler, scheduler_name, spacing):
    """Every image has a seed of its own, noise of the steps included; what is left is the rounding of other kernels."""
    if (scheduler_name, spacing) == ("DDIM", "linspace"):
        with pytest.raises(ValidationError, match="misses linspace"):
            SamplerParams(scheduler=scheduler_name, spacing=spacing, steps=4)
        return
    sampler = SamplerParams(scheduler=scheduler_name, spacing=spacing, steps=4)
    drawn = [pictures(unet, scheduler, image_seeds(0, 9), sampler, size) for size in (1, 7, 64)]

    assert drawn[0].shape == (9, 1, 8, 8)
    for other in drawn[1:]:
        assert np.abs(drawn[0].astype(int) - other).max() <= 1
        assert (drawn[0] != other).mean() < 0.01
    assert drawn[0].std() > 1


@pytest.mark.parametrize(
    "sampler", [SamplerParams(steps=4, eta=0.7), SamplerParams(steps=9, spacing="quadratic", eta=1)]
)
def test_the_noise_of_every_step_comes_from_the_images_own_seed(unet, scheduler, sampler):
    """With eta too, a picture does not depend on its neighbours; and eta matters."""
    whole = pictures(unet, scheduler, [5, 6, 7], sampler)

    assert np.array_equal(whole[2:], pictures(unet, scheduler, [7], sampler))
    assert not np.array_equal(whole, pictures(unet, scheduler, [5, 6, 7], sampler.model_copy(update={"eta": 0})))


def test_seeds_are_distinct_and_do_not_depend_on_how_many():
    """The first images of a large set are those of a small one; another set and another root have others."""
    assert image_seeds(0, 100)[:3] == image_seeds(0, 3)
    assert len({*image_seeds(0, 100), *image_seeds(1, 100), *image_seeds(0, 100, 1)}) == 300


def test_noise_belongs_to_its_seed(unet):
    """Alone or in a batch."""
    five, six, again = (torch.Generator().manual_seed(seed) for seed in (5, 6, 6))

    assert torch.equal(initial_noise(unet, [five, six])[1], initial_noise(unet, [again])[0])


def by_hand(unet, scheduler, seeds, steps):
    """DDIM by hand (Song et al., 2021, eq. 12, σ = 0): x̂0 from ε, clipped, then to the noise level of the next step."""
    images = initial_noise(unet, [torch.Generator().manual_seed(seed) for seed in seeds])
    alphas = torch.cat([scheduler.alphas_cumprod, torch.ones(1)])  # behind the last step there is no noise
    for here, there in steps:
        with torch.no_grad():
            epsilon = unet(images, here).sample
        clean = ((images - (1 - alphas[here]).sqrt() * epsilon) / alphas[here].sqrt()).clamp(-1, 1)
        images = alphas[there].sqrt() * clean + (1 - alphas[there]).sqrt() * epsilon
    return ((images + 1) * 127.5).round().clamp(0, 255).numpy()


def test_the_sampler_is_ddim(unet, scheduler):
    """As by hand, from 750 down in four steps."""
    expected = by_hand(unet, scheduler, [7, 8], [(750, 500), (500, 250), (250, 0), (0, -1)])

    assert np.abs(pictures(unet, scheduler, [7, 8]) - expected).max() <= 1


def test_quadratic_spacing_is_the_originals(unet, scheduler):
    """The squares of evenly spaced roots up to .8·T, in whole timesteps, and DDIM between them as by hand."""
    quadratic = SamplerParams(steps=5, spacing="quadratic")
    timesteps = [int(root**2) for root in np.linspace(0, 800**0.5, 5)][::-1]

    assert make_sampler(scheduler, quadratic).timesteps.tolist() == timesteps == [800, 450, 200, 50, 0]
    expected = by_hand(unet, scheduler, [7, 8], list(zip(timesteps, [*timesteps[1:], -1], strict=True)))
    assert np.abs(pictures(unet, scheduler, [7, 8], quadratic) - expected).max() <= 1


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_on_uniform_steps_our_ddim_is_that_of_diffusers(scheduler, eta):
    """Step by step, with the same noise: within 1e-6."""
    ours, theirs = (cls.from_config(scheduler.config) for cls in (QuadraticDdim, DDIMScheduler))
    theirs.set_timesteps(4)
    ours.set_timesteps(4)
    ours.timesteps, ours.following = theirs.timesteps, iter([500, 250, 0, -1])
    images, epsilon = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in theirs.timesteps:
        noise = [[torch.Generator().manual_seed(seed) for seed in range(3)] for _ in range(2)]
        (expected, *_) = theirs.step(epsilon, timestep, images, eta=eta, generator=noise[0], return_dict=False)
        (found,) = ours.step(epsilon, timestep, images, eta=eta, generator=noise[1])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        images = expected


def test_the_pictures_are_those_of_the_diffusers_pipeline(unet, scheduler):
    """DDIMPipeline with the same generators, up to rounding by one of 255."""
    pipeline = DDIMPipeline(unet, DDIMScheduler.from_config(scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    (expected,) = pipeline(2, generators, num_inference_steps=4, output_type="np", return_dict=False)

    drawn = pictures(unet, scheduler, [1, 2]).transpose(0, 2, 3, 1)
    assert np.abs(drawn - (expected * 255).round()).max() <= 1


def test_bfloat16_draws_nearly_the_same_and_leaves_the_model_alone(unet, scheduler):
    """A copy computes."""
    exact, rough = (pictures(unet, scheduler, [1, 2], precision=name) for name in ("float32", "bfloat16"))

    assert unet.dtype == torch.float32
    assert 0 < np.abs(exact.astype(int) - rough).max() < 30


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (SamplerParams(steps=600), "sampler.steps 600 does not divide the 1000 timesteps"),
        (SamplerParams(steps=1000, spacing="trailing"), None),
    ],
)
def test_steps_that_begin_below_full_noise_are_refused(scheduler, sampler, words):
    """600 steps would begin at timestep 599 of 1,000, with noise that the model does not expect there."""
    if words is None:
        assert make_sampler(scheduler, sampler).timesteps[0] == 999
    else:
        with pytest.raises(InputError, match=words):
            make_sampler(scheduler, sampler)


@pytest.mark.parametrize(
    ("spacing", "timesteps"),
    [("leading", [750, 500, 250, 0]), ("linspace", [999, 666, 333, 0]), ("trailing", [999, 749, 499, 249])],
)
def test_spacing_is_what_was_asked_for(scheduler, spacing, timesteps):
    """Also over a schedule whose config was left at its defaults, which diffusers would prefer."""
    assert (
        make_sampler(scheduler, SamplerParams(scheduler="DDPM", steps=4, spacing=spacing)).timesteps.tolist()
        == timesteps
    )


def test_clipping_is_the_models_unless_told(scheduler):
    """Null asks the model's config."""
    assert make_sampler(scheduler, FOUR).config["clip_sample"] is True
    assert make_sampler(scheduler, FOUR.model_copy(update={"clip": False})).config["clip_sample"] is False


def test_images_that_are_not_finite_are_refused(unet, scheduler):
    """With whose they are, how many, and a seed to look at."""
    with torch.no_grad():
        unet.conv_out.weight.fill_(float("inf"))

    with pytest.raises(
        InputError, match=r"pruned draws 2 of 2 images with values that are not finite \(first: seed 1\)"
    ):
        draw(unet, scheduler, [1, 2], FOUR, batch_size=2, label="pruned")


def test_a_strip_goes_from_noise_to_picture(unet, scheduler):
    """Its last frame is the picture, its first the noise."""
    strip = draw_strip(unet, scheduler, [1, 2], FOUR, 3)

    assert strip.shape == (2, 3, 1, 8, 8)
    assert np.abs(strip[:, -1].astype(int) - pictures(unet, scheduler, [1, 2])).max() <= 1
    noise = initial_noise(unet, [torch.Generator().manual_seed(1)])[0]
    assert np.abs(strip[0, 0] - ((noise + 1) * 127.5).round().clamp(0, 255).numpy()).max() == 0
