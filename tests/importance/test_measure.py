"""Importance of weights."""

import pytest
import torch
from torch import nn

from stages.artifacts import tensors_sha256
from stages.errors import InputError
from stages.importance.calibration import calibrate
from stages.importance.criteria import ENGINES, absolute_taylor, magnitude, signed_taylor, squared_taylor
from stages.importance.measure import accumulate_gradients, measure_importance

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
STEPS = range(0, 1000, 200)


@pytest.fixture
def layer():
    """A layer with weights 1, −2, 3 and gradients 2, 1, −1."""
    layer = nn.Linear(3, 1)
    layer.weight.data, layer.weight.grad = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[2.0, 1.0, -1.0]])
    return layer


@pytest.mark.parametrize(
    ("saliency", "expected"),
    [
        (magnitude, [1.0, 4.0, 9.0]),
        (signed_taylor, [2.0, -2.0, -3.0]),
        (absolute_taylor, [2.0, 2.0, 3.0]),
        (squared_taylor, [4.0, 4.0, 9.0]),
    ],
)
def test_saliency_by_hand(layer, saliency, expected):
    """Each criterion on numbers that can be checked in the head."""
    assert saliency(layer).tolist() == [expected]


def test_only_the_paper_counts_group_norm():
    """There with |w·g|, not squared; magnitude never does."""
    norm = nn.GroupNorm(1, 2)
    norm.weight.data, norm.weight.grad = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 3.0])

    assert squared_taylor(norm).tolist() == [3.0, 6.0]
    assert [criterion(norm) for criterion in (magnitude, signed_taylor, absolute_taylor)] == [None, None, None]


def test_gradients_are_those_of_the_summed_loss(unet, scheduler):
    """Summing over timesteps one by one equals one backward pass through the sum (autograd as the reference)."""
    for engine in ENGINES.values():
        accumulate_gradients(unet, scheduler, X, NOISE, STEPS, engine, 0.0)
        found = unet.conv_in.weight.grad.clone()
        losses = []
        for step in STEPS:
            noisy = scheduler.add_noise(X, NOISE, torch.tensor([step, step]))
            losses.append(engine.loss((unet(noisy, step).sample - NOISE).square()))
        (expected,) = torch.autograd.grad(sum(losses), [unet.conv_in.weight])

        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("formula", "used"), [("paper", 2), ("diffusers", 3)])
def test_the_sum_ends_at_the_first_loss_below_the_threshold(scheduler, formula, used):
    """A model whose loss is 4, 4, 1, 4, … stops at the third timestep for T = .5; only diffusers counts that one."""

    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, _, timesteps):
            error = 1.0 if int(timesteps[0]) == 400 else 2.0
            return type("Output", (), {"sample": NOISE + error * self.weight})

    losses = accumulate_gradients(Scripted(), scheduler, X, NOISE, STEPS, ENGINES[formula], 0.5)
    assert len(losses) == used


def test_measuring_leaves_the_model_as_it_was(unet, scheduler):
    """Weights are the same and no gradient is left behind."""
    before = tensors_sha256(unet.state_dict())
    importance = measure_importance(
        unet, scheduler, X, NOISE, STEPS, criterion="taylor", formula="paper", threshold=0.0
    )

    assert tensors_sha256(unet.state_dict()) == before == importance.model_sha256
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert importance.timesteps == list(STEPS)


def test_the_same_seed_gives_the_same_importance(unet, scheduler, images, params):
    """And another seed other images and noise."""
    chosen = params.importance.model_copy(update={"stride": 250, "num_images": 4})
    first, second, other = (calibrate(unet, scheduler, images.train, chosen, seed) for seed in (0, 0, 1))

    assert tensors_sha256(first.saliency) == tensors_sha256(second.saliency) != tensors_sha256(other.saliency)


def test_more_calibration_images_than_there_are_is_refused(unet, scheduler, images, params):
    """Both numbers and the key to change."""
    greedy = params.importance.model_copy(update={"num_images": 25})

    with pytest.raises(InputError, match=r"importance\.num_images 25 is more than the 24 training images"):
        calibrate(unet, scheduler, images.train, greedy, 0)
