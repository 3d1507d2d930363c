"""Samplers and image sampling."""

from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from pydantic import ValidationError

from stages.models.channels_last import to_channels_last
from stages.models.params import STEP_EVENLY, SamplerParams, SchedulerName
from stages.models.samplers import QuadraticDdim, check_sampler, make_sampler
from stages.models.sampling import draw, draw_strip, image_seeds, initial_noise, to_pixels, trajectory
from stages.register.package import replace_quadratic
from stages.runtime.errors import InputError

FOUR = SamplerParams(steps=4)


def draw_images(unet, scheduler, seeds, sampler=FOUR, batch_size=8, **options):
    """Draw with an empty label."""
    return draw(unet, scheduler, seeds, sampler, batch_size=batch_size, label="", **options)


@pytest.mark.parametrize("scheduler_name", get_args(SchedulerName))
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_the_batch_size_does_not_change_an_image(unet, scheduler, scheduler_name, spacing):
    """Initial and step noise come from each image's own seed; kernels may round by one level of 255."""
    if scheduler_name in STEP_EVENLY and spacing == "linspace":
        with pytest.raises((ValidationError, InputError), match="misses the timesteps of linspace"):
            make_sampler(scheduler, SamplerParams(scheduler=scheduler_name, spacing=spacing, steps=4))
        return
    sampler = SamplerParams(scheduler=scheduler_name, spacing=spacing, steps=4)
    drawn = [draw_images(unet, scheduler, image_seeds(0, 9), sampler, size) for size in (1, 7, 64)]

    assert drawn[0].shape == (9, 1, 8, 8)
    for other in drawn[1:]:
        assert np.abs(drawn[0].astype(int) - other).max() <= 1
        assert (drawn[0] != other).mean() < 0.01
    assert drawn[0].std() > 1


@pytest.mark.parametrize(
    "sampler", [SamplerParams(steps=4, eta=0.7), SamplerParams(steps=9, spacing="quadratic", eta=1)]
)
def test_step_noise_depends_only_on_the_images_seed(unet, scheduler, sampler):
    """With eta, an image does not depend on the rest of its batch, and differs from the image without eta."""
    whole = draw_images(unet, scheduler, [5, 6, 7], sampler)

    assert np.array_equal(whole[2:], draw_images(unet, scheduler, [7], sampler))
    assert not np.array_equal(whole, draw_images(unet, scheduler, [5, 6, 7], sampler.model_copy(update={"eta": 0})))


def test_image_seeds_are_distinct_and_independent_of_their_number():
    """A small set has the first seeds of a large set; other sets and root seeds share none of them."""
    assert image_seeds(0, 100)[:3] == image_seeds(0, 3)
    assert len({*image_seeds(0, 100), *image_seeds(1, 100), *image_seeds(0, 100, 1)}) == 300


def test_initial_noise_depends_only_on_its_seed(unet):
    """It is the same alone and in a batch."""
    five, six, again = (torch.Generator().manual_seed(seed) for seed in (5, 6, 6))

    assert torch.equal(initial_noise(unet, [five, six])[1], initial_noise(unet, [again])[0])


def ddim(unet, scheduler, seeds, steps):
    """Plain DDIM (Song et al., 2021, eq. 12, σ = 0): clipped x̂0 from ε, then the noise level of the next timestep."""
    images = initial_noise(unet, [torch.Generator().manual_seed(seed) for seed in seeds])
    alphas = torch.cat([scheduler.alphas_cumprod, torch.ones(1)])  # index -1: no noise after the last step
    for current, following in steps:
        with torch.no_grad():
            epsilon = unet(images, current).sample
        clean = ((images - (1 - alphas[current]).sqrt() * epsilon) / alphas[current].sqrt()).clamp(-1, 1)
        images = alphas[following].sqrt() * clean + (1 - alphas[following]).sqrt() * epsilon
    return ((images + 1) * 127.5).round().clamp(0, 255).numpy()


def test_default_sampling_is_ddim(unet, scheduler):
    """Four steps from timestep 750 equal plain DDIM."""
    expected = ddim(unet, scheduler, [7, 8], [(750, 500), (500, 250), (250, 0), (0, -1)])

    assert np.abs(draw_images(unet, scheduler, [7, 8]) - expected).max() <= 1


def test_quadratic_spacing_follows_the_ddim_code(unet, scheduler):
    """Timesteps are ⌊r²⌋ for evenly spaced r up to √(0.8·T), with plain DDIM steps between them."""
    quadratic = SamplerParams(steps=5, spacing="quadratic")
    timesteps = [int(root**2) for root in np.linspace(0, 800**0.5, 5)][::-1]

    assert make_sampler(scheduler, quadratic).timesteps.tolist() == timesteps == [800, 450, 200, 50, 0]
    expected = ddim(unet, scheduler, [7, 8], list(zip(timesteps, [*timesteps[1:], -1], strict=True)))
    assert np.abs(draw_images(unet, scheduler, [7, 8], quadratic) - expected).max() <= 1


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_our_ddim_step_matches_diffusers(scheduler, eta):
    """On uniform timesteps with the same noise, each step agrees within 1e-6."""
    ours, theirs = (cls.from_config(scheduler.config) for cls in (QuadraticDdim, DDIMScheduler))
    theirs.set_timesteps(4)
    ours.set_timesteps(4)
    ours.timesteps, ours.next_timesteps = theirs.timesteps, iter([500, 250, 0, -1])
    images, epsilon = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in theirs.timesteps:
        noise = [[torch.Generator().manual_seed(seed) for seed in range(3)] for _ in range(2)]
        (expected, *_) = theirs.step(epsilon, timestep, images, eta=eta, generator=noise[0], return_dict=False)
        (found,) = ours.step(epsilon, timestep, images, eta=eta, generator=noise[1])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        images = expected


def test_images_match_the_diffusers_pipeline(unet, scheduler):
    """DDIMPipeline with the same generators gives the same images up to one level of 255."""
    pipeline = DDIMPipeline(unet, DDIMScheduler.from_config(scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    (expected,) = pipeline(2, generators, num_inference_steps=4, output_type="np", return_dict=False)

    drawn = draw_images(unet, scheduler, [1, 2]).transpose(0, 2, 3, 1)
    assert np.abs(drawn - (expected * 255).round()).max() <= 1


def test_a_model_with_weights_of_another_rank_is_drawn(unet, scheduler):
    """Channels last is a layout of four dimensions, and an own class may have a Conv3d."""
    alone = draw_images(unet, scheduler, [0])
    unet.extra = torch.nn.Conv3d(1, 1, 1)
    assert np.array_equal(draw_images(unet, scheduler, [0]), alone)
    to_channels_last(unet)
    assert unet.up_blocks[0].resnets[0].conv_shortcut.weight.stride()[-1] > 1  # of a 1×1 convolution
    assert unet.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    assert unet.extra.weight.is_contiguous()


def test_bfloat16_is_close_to_float32_and_does_not_change_the_model(unet, scheduler):
    """Sampling in bfloat16 uses a copy of the model."""
    exact, approximate = (draw_images(unet, scheduler, [1, 2], precision=name) for name in ("float32", "bfloat16"))

    assert unet.dtype == torch.float32
    assert 0 < np.abs(exact.astype(int) - approximate).max() < 30


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (SamplerParams(steps=600), "sampler.steps 600 does not divide the 1000 timesteps"),
        (SamplerParams(steps=1000, spacing="trailing"), None),
    ],
)
def test_steps_that_begin_below_full_noise_are_refused(scheduler, sampler, message):
    """600 leading steps would begin at timestep 599 of 1,000 although the initial noise is that of 999."""
    if message is None:
        assert make_sampler(scheduler, sampler).timesteps[0] == 999
    else:
        with pytest.raises(InputError, match=message):
            make_sampler(scheduler, sampler)


@pytest.mark.parametrize(
    ("spacing", "timesteps"),
    [("leading", [750, 500, 250, 0]), ("linspace", [999, 666, 333, 0]), ("trailing", [999, 749, 499, 249])],
)
def test_spacing_of_params_overrides_the_scheduler(scheduler, spacing, timesteps):
    """It also holds for a schedule with default config, where diffusers would ignore the override."""
    assert (
        make_sampler(scheduler, SamplerParams(scheduler="DDPM", steps=4, spacing=spacing)).timesteps.tolist()
        == timesteps
    )


@pytest.mark.parametrize("scheduler_name", get_args(SchedulerName))
def test_trailing_steps_are_those_that_the_sampler_takes(scheduler, scheduler_name):
    """DDIM and PNDM would go from 966 to 933, 33 a step, where 932 is next; others look at the next timestep."""
    sampler = SamplerParams(scheduler=scheduler_name, spacing="trailing", steps=30)
    if scheduler_name in STEP_EVENLY:
        with pytest.raises(InputError, match=f"1000 timesteps of the model, and {scheduler_name} would miss trailing"):
            make_sampler(scheduler, sampler)
    else:
        check_sampler(scheduler, sampler)


@pytest.mark.parametrize(("steps", "taken"), [(100, 100), (75, 100), (1, 1), (501, 1000), (1000, 1000)])
def test_quadratic_steps_are_replaced_by_trailing_ones_that_divide(scheduler, steps, taken):
    """Diffusers draws a version with at least as many steps as the protocol."""
    params = replace_quadratic(SamplerParams(spacing="quadratic", steps=steps), scheduler)

    assert params == SamplerParams(spacing="trailing", steps=taken)
    make_sampler(scheduler, params)


def test_clip_null_uses_the_models_setting(scheduler):
    """Only an explicit value overrides clip_sample of the scheduler's config."""
    assert make_sampler(scheduler, FOUR).config["clip_sample"] is True
    assert make_sampler(scheduler, FOUR.model_copy(update={"clip": False})).config["clip_sample"] is False


def test_images_that_are_not_finite_are_refused(unet, scheduler):
    """The error gives the label, the number of images and the first seed."""
    with torch.no_grad():
        unet.conv_out.weight.fill_(float("inf"))

    with pytest.raises(
        InputError, match=r"pruned draws 2 of 2 images with values that are not finite \(first: seed 1\)"
    ):
        draw(unet, scheduler, [1, 2], FOUR, batch_size=2, label="pruned")


@pytest.mark.parametrize(
    ("sampler", "precision"), [(FOUR, "float32"), (FOUR, "bfloat16"), (SamplerParams(steps=4, eta=0.7), "float32")]
)
def test_a_strip_goes_from_noise_to_image(unet, scheduler, sampler, precision):
    """Its first frame is the initial noise, its last the image, with the same precision and noise of the steps."""
    strip = draw_strip(unet, scheduler, [1, 2], sampler, 3, precision)

    assert strip.shape == (2, 3, 1, 8, 8)
    image = draw_images(unet, scheduler, [1, 2], sampler, precision=precision)
    assert np.abs(strip[:, -1].astype(int) - image).max() <= 1
    noise = initial_noise(unet, [torch.Generator().manual_seed(1)])[0]
    assert np.abs(strip[0, 0] - ((noise + 1) * 127.5).round().clamp(0, 255).numpy()).max() == 0


def test_a_strip_is_denser_towards_the_image(unet, scheduler):
    """Of ten steps the middle of three frames is what the ninth begins with: 10 · (1 − 0.5²), rounded (closed form)."""
    ten = SamplerParams(steps=10)
    strip = draw_strip(unet, scheduler, [1], ten, 3)
    with torch.inference_mode():
        states = [to_pixels(state).astype(int) for state in trajectory(unet, make_sampler(scheduler, ten), [1])]

    assert [int(np.abs(strip[:, 1] - state).max()) <= 1 for state in states] == [index == 8 for index in range(11)]


@pytest.mark.parametrize("name", ["EulerDiscrete", "HeunDiscrete", "LMSDiscrete"])
def test_a_table_of_timesteps_takes_whole_ones(make_unet, scheduler, name):
    """Such samplers have timesteps in floating point, which no table takes; fractional ones are in none."""
    unet = make_unet(time_embedding_type="learned", num_train_timesteps=1000)
    assert draw_images(unet, scheduler, [0], SamplerParams(scheduler=name, steps=4, spacing="leading")).size
    with pytest.raises(
        InputError, match=r"steps to timesteps such as \d+\.\d+, and the model takes whole ones; choose"
    ):
        draw_images(unet, scheduler, [0], SamplerParams(scheduler=name, steps=5, spacing="linspace"))
