"""The loss of a DiT with a learned variance, against closed forms."""

import math

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from recipes.dit_digits import HybridLoss, log_probability


@pytest.fixture
def batch():
    """Images, noise, timesteps above 0, and the noisy images."""
    draws = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(4, 1, 4, 4, generator=draws) for _ in range(2))
    steps = torch.tensor([1, 40, 500, 999])
    return clean, noise, DDPMScheduler().add_noise(clean, noise, steps), steps


def test_a_perfect_model_has_no_loss(batch):
    """It predicts ε, and the variance of the posterior: the lower end of the range."""
    loss = HybridLoss(DDPMScheduler(), torch.device("cpu"))
    clean, noise, noisy, steps = batch
    output = torch.cat([noise, -torch.ones_like(noise)], dim=1)

    assert float(loss(output, clean, noise, noisy, steps)) == pytest.approx(0, abs=1e-5)


def test_the_upper_end_of_the_range_is_the_variance_of_the_forward_step(batch):
    """KL of two Gaussians of equal mean and variances β̃ and β: (β̃/β − 1 − log(β̃/β)) / 2 (closed form)."""
    scheduler = DDPMScheduler()
    loss = HybridLoss(scheduler, torch.device("cpu"))
    clean, noise, noisy, steps = batch
    output = torch.cat([noise, torch.ones_like(noise)], dim=1)
    alphas = scheduler.alphas_cumprod
    ratios = [float((1 - alphas[step - 1]) / (1 - alphas[step])) for step in steps]
    expected = sum((ratio - 1 - math.log(ratio)) / 2 / math.log(2) for ratio in ratios) / 4

    assert float(loss(output, clean, noise, noisy, steps)) == pytest.approx(expected, rel=1e-3)


def test_only_the_variance_learns_from_the_bound(batch):
    """The gradient of the prediction is that of its squared error."""
    clean, noise, noisy, steps = batch
    predicted, variance = (torch.zeros_like(noise, requires_grad=True) for _ in range(2))
    output = torch.cat([predicted, variance], dim=1)
    HybridLoss(DDPMScheduler(), torch.device("cpu"))(output, clean, noise, noisy, steps).backward()

    torch.testing.assert_close(predicted.grad, -2 * noise / noise.numel())
    assert variance.grad.abs().sum() > 0


def test_the_probabilities_of_all_pixel_values_sum_to_one():
    """Whatever the mean and the variance are."""
    values = torch.arange(256) / 127.5 - 1
    for mean, log_variance in ((0.2, -6.0), (-1.5, 0.0)):
        chances = log_probability(values, torch.full((256,), mean), torch.full((256,), log_variance)).exp()
        assert float(chances.sum()) == pytest.approx(1, abs=1e-4)
