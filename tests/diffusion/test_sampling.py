"""Drawing images."""

import numpy as np
import pytest
import torch

from stages.diffusion.sampling import draw, image_seeds, initial_noise
from stages.errors import InputError


def test_batching_does_not_change_a_picture(unet, scheduler):
    """Every image has a seed of its own: batches of 1, 4 and 7 draw the same seven pictures."""
    seeds = image_seeds(0, 7)
    drawn = [draw(unet, scheduler, seeds, steps=4, batch_size=size, label="") for size in (1, 4, 7)]

    assert drawn[0].shape == (7, 1, 8, 8)
    assert np.abs(drawn[0].astype(int) - drawn[1]).max() <= 1
    assert np.abs(drawn[0].astype(int) - drawn[2]).max() <= 1


def test_seeds_are_distinct_and_do_not_depend_on_how_many(unet):
    """The first images of a large set are those of a small one."""
    assert image_seeds(0, 100)[:3] == image_seeds(0, 3)
    assert len(set(image_seeds(0, 100) + image_seeds(1, 100))) == 200
    assert torch.equal(initial_noise(unet, [5, 6])[1], initial_noise(unet, [6])[0])


def test_the_sampler_is_ddim(unet, scheduler):
    """By hand (Song et al., 2021, eq. 12, σ = 0): x̂0 from ε, clipped, then back to the noise level of the next step."""
    images = initial_noise(unet, [7, 8])
    alphas = torch.cat([scheduler.alphas_cumprod, torch.ones(1)])  # behind the last step there is no noise
    for here, there in [(750, 500), (500, 250), (250, 0), (0, -1)]:
        with torch.no_grad():
            epsilon = unet(images, here).sample
        clean = ((images - (1 - alphas[here]).sqrt() * epsilon) / alphas[here].sqrt()).clamp(-1, 1)
        images = alphas[there].sqrt() * clean + (1 - alphas[there]).sqrt() * epsilon
    by_hand = ((images + 1) * 127.5).round().clamp(0, 255)

    drawn = draw(unet, scheduler, [7, 8], steps=4, batch_size=2, label="")
    assert np.abs(drawn - by_hand.numpy()).max() <= 1


def test_steps_that_begin_below_full_noise_are_refused(unet, scheduler):
    """600 steps would begin at timestep 599 of 1,000, with noise that the model does not expect there."""
    with pytest.raises(InputError, match="sampler_steps 600 does not divide the 1000 timesteps"):
        draw(unet, scheduler, [0], steps=600, batch_size=1, label="")
