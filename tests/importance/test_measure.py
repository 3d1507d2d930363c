"""The importance of weights: criteria, the sum over timesteps, calibration."""

from typing import ClassVar

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from stages.importance.calibration import calibrate
from stages.importance.criteria import (
    CRITERIA,
    FORMULAS,
    absolute_taylor,
    fisher,
    magnitude,
    signed_taylor,
    squared_taylor,
)
from stages.importance.measure import CalibrationBatch, measure_importance
from stages.runtime.errors import InputError
from stages.storage.tensors import tensors_sha256

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
BATCH = CalibrationBatch(X, NOISE)
STEPS = range(0, 1000, 200)


@pytest.fixture
def layer():
    """A linear layer with weights 1, −2, 3."""
    layer = nn.Linear(3, 1)
    layer.weight.data = torch.tensor([[1.0, -2.0, 3.0]])
    return layer


@pytest.mark.parametrize(
    ("saliency", "expected"),
    [
        (magnitude, [1.0, 4.0, 9.0]),
        (signed_taylor, [2.0, -2.0, -3.0]),
        (absolute_taylor, [2.0, 2.0, 3.0]),
        (squared_taylor, [4.0, 4.0, 9.0]),
        (fisher, [4.0, 4.0, 9.0]),
    ],
)
def test_saliency_by_hand(layer, saliency, expected):
    """Each criterion on gradients 2, 1, −1 (closed form)."""
    assert saliency(layer, torch.tensor([[2.0, 1.0, -1.0]])).tolist() == [expected]


def test_only_squared_taylor_scores_group_norm():
    """With |w·g|, not squared; the other criteria ignore it."""
    norm, gradient = nn.GroupNorm(1, 2), torch.tensor([3.0, 3.0])
    norm.weight.data = torch.tensor([1.0, -2.0])

    assert squared_taylor(norm, gradient).tolist() == [3.0, 6.0]
    assert [score(norm, gradient) for score in (magnitude, signed_taylor, absolute_taylor, fisher)] == [None] * 4


def test_the_formula_ldm_counts_group_norm():
    """In taylor, diff-pruning and those derived from them, as w·g or |w·g|; not in the others."""
    norm, gradient = nn.GroupNorm(1, 2), torch.tensor([3.0, 3.0])
    norm.weight.data = torch.tensor([1.0, -2.0])
    found = {name: criterion.saliency["ldm"](norm, gradient) for name, criterion in CRITERIA.items()}

    assert found.pop("taylor").tolist() == [3.0, -6.0]
    for name in ("diff-pruning", "no-cancel-taylor", "snr-taylor"):
        assert found.pop(name).tolist() == [3.0, 6.0]
    assert found == dict.fromkeys(["random", "magnitude", "fisher"])


def losses_of(unet, scheduler, formula, batch):
    """L_t of every timestep, computed from the definition."""
    losses = []
    for step in STEPS:
        noisy = scheduler.add_noise(batch.images, batch.noise, torch.tensor([step, step]))
        losses.append(FORMULAS[formula].loss((unet(noisy, step).sample - batch.noise).square()))
    return losses


@pytest.mark.parametrize("timesteps_per_pass", [1, 2, 5, 9])
@pytest.mark.parametrize("formula", FORMULAS)
def test_taylor_uses_the_gradient_of_the_summed_loss(unet, scheduler, formula, timesteps_per_pass):
    """For any number of timesteps per pass (autograd as reference)."""
    found = measure_importance(
        unet, scheduler, [BATCH], STEPS, criterion="taylor", formula=formula, timesteps_per_pass=timesteps_per_pass
    )
    (gradient,) = torch.autograd.grad(sum(losses_of(unet, scheduler, formula, BATCH)), [unet.conv_in.weight])
    expected = CRITERIA["taylor"].saliency[formula](unet.conv_in, gradient)

    torch.testing.assert_close(found.saliency["conv_in"], expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("formula", FORMULAS)
def test_the_loss_is_that_of_the_models_own_target(unet, kind, formula):
    """For v that of diffusers' velocity, for x₀ that of the clean image; two timesteps in one pass (autograd)."""
    scheduler = DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=True)
    steps, losses = [0, 500, 999], []
    for step in steps:
        timesteps = torch.tensor([step, step])
        target = X if kind == "sample" else scheduler.get_velocity(X, NOISE, timesteps)
        output = unet(scheduler.add_noise(X, NOISE, timesteps), timesteps).sample
        losses.append(FORMULAS[formula].loss((output - target).square()))
    found = measure_importance(
        unet, scheduler, [BATCH], steps, criterion="taylor", formula=formula, timesteps_per_pass=2
    )
    (gradient,) = torch.autograd.grad(sum(losses), [unet.conv_in.weight])
    expected = CRITERIA["taylor"].saliency[formula](unet.conv_in, gradient)

    torch.testing.assert_close(found.losses, [[loss.item() for loss in losses]], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.saliency["conv_in"], expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("criterion", "power"), [("no-cancel-taylor", 1), ("fisher", 2)])
def test_per_timestep_criteria_sum_saliencies(unet, scheduler, criterion, power):
    """Σ_t |w·g_t|^p, with the gradient of each single timestep."""
    found = measure_importance(unet, scheduler, [BATCH], STEPS, criterion=criterion, formula="paper")
    weight = unet.conv_in.weight
    losses = losses_of(unet, scheduler, "paper", BATCH)
    gradients = [torch.autograd.grad(loss, [weight], retain_graph=True)[0] for loss in losses]

    expected = sum((weight * gradient).abs() ** power for gradient in gradients)
    torch.testing.assert_close(found.saliency["conv_in"], expected, rtol=1e-3, atol=1e-7)


def test_snr_taylor_weights_timesteps_by_their_share_of_signal(unet, scheduler):
    """Σ_t ᾱ_t g_t instead of a threshold; ᾱ = SNR / (1 + SNR)."""
    found = measure_importance(unet, scheduler, [BATCH], STEPS, criterion="snr-taylor", formula="diffusers")
    losses = losses_of(unet, scheduler, "diffusers", BATCH)
    weighted = sum(scheduler.alphas_cumprod[step] * loss for step, loss in zip(STEPS, losses, strict=True))
    (gradient,) = torch.autograd.grad(weighted, [unet.conv_in.weight])

    torch.testing.assert_close(found.saliency["conv_in"], (unet.conv_in.weight * gradient).abs(), rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_batches_are_averaged(unet, scheduler, criterion):
    """The same batch twice changes nothing; batches may come from an iterator."""
    chosen = {"criterion": criterion, "formula": "paper"}
    once = measure_importance(unet, scheduler, [BATCH], STEPS, **chosen)
    twice = measure_importance(unet, scheduler, iter([BATCH, BATCH]), STEPS, **chosen)

    assert twice.losses == once.losses * 2
    for name, saliency in once.saliency.items():
        torch.testing.assert_close(twice.saliency[name], saliency, rtol=1e-4, atol=1e-6)


def test_bfloat16_is_close_and_recorded(unet, scheduler):
    """Autocast changes gradients by about a percent; the importance has the precision."""
    chosen = {"criterion": "diff-pruning", "formula": "diffusers"}
    exact, fast = (
        measure_importance(unet, scheduler, [BATCH], STEPS, precision=precision, **chosen)
        for precision in ("float32", "bfloat16")
    )
    error = (fast.saliency["conv_out"] - exact.saliency["conv_out"]).norm() / exact.saliency["conv_out"].norm()

    assert 0 < error < 0.05
    assert (exact.precision, fast.precision) == ("float32", "bfloat16")


class Scripted(nn.Module):
    """A model whose squared error is 4, and 1 at timestep 400."""

    config: ClassVar = {"in_channels": 1}

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, noisy, timesteps):
        """The noise plus 2 or 1."""
        error = torch.where(timesteps == 400, 1.0, 2.0)[:, None, None, None]
        noise = NOISE.repeat(len(noisy) // len(NOISE), 1, 1, 1)
        return type("Output", (), {"sample": noise + error * self.conv.weight / self.conv.weight.detach()})


@pytest.mark.parametrize("timesteps_per_pass", [1, 2, 3, 5])
@pytest.mark.parametrize(("formula", "used"), [("paper", 2), ("diffusers", 3), ("ldm", 2)])
def test_the_sum_ends_at_the_first_loss_below_the_threshold(scheduler, formula, used, timesteps_per_pass):
    """Losses 4, 4, 1, 4, … stop at the third timestep for T = 0.5; only diffusers includes it."""
    chosen = {"criterion": "diff-pruning", "formula": formula, "timesteps_per_pass": timesteps_per_pass}
    found = measure_importance(Scripted(), scheduler, [BATCH], STEPS, threshold=0.5, **chosen)
    full = measure_importance(Scripted(), scheduler, [BATCH], STEPS[:used], criterion="taylor", formula=formula)

    assert [len(losses) for losses in found.losses] == [used]
    torch.testing.assert_close(found.losses, full.losses)


@pytest.mark.parametrize(
    ("criterion", "used"), [("taylor", 5), ("snr-taylor", 5), ("fisher", 2), ("no-cancel-taylor", 2)]
)
def test_only_criteria_with_a_threshold_end_at_it(scheduler, criterion, used):
    """The others sum over all timesteps, whatever the threshold is."""
    chosen = {"criterion": criterion, "formula": "paper", "threshold": 0.5}
    found = measure_importance(Scripted(), scheduler, [BATCH], STEPS, **chosen)

    assert [len(losses) for losses in found.losses] == [used]


def test_a_loss_at_the_threshold_does_not_end_the_sum(scheduler):
    """For T = 1, losses that are all equal count."""
    chosen = {"criterion": "diff-pruning", "formula": "paper", "threshold": 1.0}
    found = measure_importance(Scripted(), scheduler, [BATCH], [0, 200], **chosen)

    assert [len(losses) for losses in found.losses] == [2]


def test_measuring_does_not_change_the_model(unet, scheduler):
    """Weights, memory format and requires_grad are the same, and no gradient is left."""
    before = tensors_sha256(unet.state_dict())
    importance = measure_importance(
        unet, scheduler, [BATCH], STEPS, criterion="taylor", formula="paper", timesteps_per_pass=2
    )

    assert tensors_sha256(unet.state_dict()) == before == importance.model_sha256
    assert all(parameter.grad is None and parameter.requires_grad for parameter in unet.parameters())
    assert all(parameter.is_contiguous() for parameter in unet.parameters())
    assert importance.timesteps == list(STEPS)


def test_the_same_seed_gives_the_same_importance(unet, scheduler, images, params):
    """Another seed gives another one."""
    chosen = params.importance.model_copy(update={"stride": 250, "num_images": 4})
    first, second, other = (calibrate(unet, scheduler, images, chosen, seed) for seed in (0, 0, 1))

    assert tensors_sha256(first.saliency) == tensors_sha256(second.saliency) != tensors_sha256(other.saliency)


def test_more_calibration_images_than_there_are_is_refused(unet, scheduler, images, params):
    """The message has both numbers and the key."""
    too_many = params.importance.model_copy(update={"num_images": 25})

    with pytest.raises(InputError, match=r"importance\.num_images 25 is more than the 24 training images"):
        calibrate(unet, scheduler, images, too_many, 0)


@pytest.mark.parametrize(
    ("stride", "count", "expected"), [(1, 3, [0, 1, 2]), (400, 2, [0, 400]), (400, None, [0, 400, 800])]
)
def test_num_timesteps_selects_the_first_timesteps(unet, scheduler, images, params, stride, count, expected):
    """Of those that the stride leaves."""
    chosen = params.importance.model_copy(
        update={"criterion": "taylor", "stride": stride, "num_timesteps": count, "num_images": 2}
    )

    assert calibrate(unet, scheduler, images, chosen, 0).timesteps == expected


@pytest.mark.parametrize("stride", [1000, 5000])
def test_a_stride_beyond_the_last_timestep_is_refused(unet, scheduler, images, params, stride):
    """It would measure at timestep 0 alone, as num_timesteps 1 says plainly."""
    chosen = params.importance.model_copy(update={"stride": stride})

    with pytest.raises(InputError, match=f"importance.stride {stride} leaves only timestep 0 of 1000"):
        calibrate(unet, scheduler, images, chosen, 0)


def test_more_timesteps_than_there_are_is_refused(unet, scheduler, images, params):
    """The message has both numbers and both keys."""
    chosen = params.importance.model_copy(update={"stride": 10, "num_timesteps": 101})

    with pytest.raises(InputError, match=r"num_timesteps 101 is more than the 100 timesteps that stride 10 leaves"):
        calibrate(unet, scheduler, images, chosen, 0)


@pytest.mark.parametrize("criterion", ["magnitude", "random", "diff-pruning"])
def test_a_norm_without_weights_has_no_importance(unet, scheduler, criterion):
    """An own class may have one."""
    unet.conv_norm_out = nn.GroupNorm(unet.conv_norm_out.num_groups, unet.conv_norm_out.num_channels, affine=False)
    found = measure_importance(unet, scheduler, [BATCH], STEPS, criterion=criterion, formula="paper")

    assert "conv_norm_out" not in found.saliency
    assert ("conv_in" in found.saliency) == (criterion != "random")
