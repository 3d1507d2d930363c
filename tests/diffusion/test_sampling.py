"""Drawing images."""

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from stages.diffusion.sampling import draw, image_seeds, initial_noise


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
    """One step by hand (Song et al., 2021, eq. 12, σ = 0): x̂0 from ε, then back to the noise level of the next step."""
    noise = initial_noise(unet, [0])
    ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    ddim.set_timesteps(2)
    first, second = ddim.timesteps.tolist()
    alphas = scheduler.alphas_cumprod
    with torch.no_grad():
        epsilon = unet(noise, first).sample
        clean = (noise - (1 - alphas[first]).sqrt() * epsilon) / alphas[first].sqrt()
        by_hand = alphas[second].sqrt() * clean + (1 - alphas[second]).sqrt() * epsilon
        theirs = ddim.step(epsilon, first, noise, eta=0.0).prev_sample

    torch.testing.assert_close(theirs, by_hand)
