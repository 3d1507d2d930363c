"""The training losses, against their formulas."""

import copy
import dataclasses

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from stages.finetune.distillation import FeatureHooks, kept_channels, read_teacher
from stages.finetune.loss import LOSSES, Objective, Prediction
from stages.finetune.params import LossParams
from stages.prune.params import PruneParams, Target
from stages.prune.pruning import prune_unet
from stages.prune.selection import plan_pruning
from stages.runtime.errors import InputError


@pytest.fixture
def prediction():
    """Random predictions and features of two models for three images."""
    draws = torch.Generator().manual_seed(0)
    noise, student, teacher = torch.randn(3, 3, 1, 4, 4, generator=draws)
    features = tuple((torch.randn(3, 2, 2, 2, generator=draws), torch.randn(3, 2, 2, 2, generator=draws)) for _ in "ab")
    return Prediction(noise, student, teacher, features)


@pytest.fixture
def pruned(unet, magnitude):
    """A pruned copy of the tiny UNet, and its plan."""
    plan = plan_pruning(unet, magnitude, PruneParams(target=Target(ratio=0.3)), 0)
    return prune_unet(copy.deepcopy(unet), plan, None), plan


def test_each_loss_is_its_formula(prediction):
    """‖ε − ε_s‖², ‖ε_t − ε_s‖² and the mean over blocks of ‖f_s − f_t‖² / ‖f_t‖², image by image."""
    ratios = [
        (mine - theirs).pow(2).sum((1, 2, 3)) / theirs.pow(2).sum((1, 2, 3)) for mine, theirs in prediction.features
    ]

    torch.testing.assert_close(
        LOSSES["noise"](prediction), (prediction.target - prediction.student).pow(2).mean((1, 2, 3))
    )
    torch.testing.assert_close(
        LOSSES["output"](prediction), (prediction.teacher - prediction.student).pow(2).mean((1, 2, 3))
    )
    torch.testing.assert_close(LOSSES["feature"](prediction), (ratios[0] + ratios[1]) / 2)


def test_losses_of_bfloat16_predictions_are_computed_in_float32(prediction):
    """Autocast returns such; squares and means of their differences would lose digits."""
    target, student = prediction.target.bfloat16(), prediction.student.bfloat16()
    found = LOSSES["noise"](Prediction(target, student))

    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (target - student).float().square().mean((1, 2, 3)))


def test_the_objective_is_the_weighted_sum_of_the_losses(prediction, scheduler):
    """With γ it is multiplied by min(SNR, γ) / SNR, where SNR = ᾱ / (1 − ᾱ); a loss of weight 0 is not computed."""
    timesteps = torch.tensor([0, 500, 999])
    weights = {"noise": 1.0, "output": 0.5, "feature": 0.25}
    total = sum(weight * LOSSES[name](prediction) for name, weight in weights.items())
    alpha = scheduler.alphas_cumprod[timesteps]
    snr = alpha / (1 - alpha)

    torch.testing.assert_close(Objective(scheduler, LossParams(**weights))(prediction, timesteps), total)
    weighted = Objective(scheduler, LossParams(**weights, min_snr=5))(prediction, timesteps)
    torch.testing.assert_close(weighted, total * torch.minimum(snr, torch.tensor(5.0)) / snr)
    without = Prediction(prediction.target, prediction.student)
    torch.testing.assert_close(Objective(scheduler, LossParams())(without, timesteps), LOSSES["noise"](prediction))


def test_student_and_teacher_features_have_the_same_channels(unet, pruned):
    """Channel i of the pruned layer has the weights of channel K_i of the dense one."""
    student, plan = pruned
    channels = kept_channels(unet, plan)
    blocks = [name for name, module in unet.named_modules() if isinstance(module, ResnetBlock2D)]
    hooks = [FeatureHooks(student, dict.fromkeys(channels)), FeatureHooks(unet, channels)]
    images, timesteps = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    for hook, model in zip(hooks, (student, unet), strict=True):
        hook.start()
        model(images, timesteps)
    features = [hook.stop() for hook in hooks]

    assert list(channels) == blocks
    assert any(kept for kept in channels.values())
    for name, mine, theirs in zip(blocks, *features, strict=True):
        assert mine.shape == theirs.shape
        kept = plan.layers[f"{name}.conv2"].outputs
        weight = unet.get_submodule(name).conv2.weight
        inputs = plan.layers[f"{name}.conv2"].inputs or list(range(weight.shape[1]))
        expected = weight[kept or list(range(len(weight)))][:, inputs]
        torch.testing.assert_close(student.get_submodule(name).conv2.weight, expected)


def test_an_unpruned_student_has_the_teachers_features(unet):
    """Identity: the feature and output losses of a copy are 0."""
    channels = {name: None for name, module in unet.named_modules() if isinstance(module, ResnetBlock2D)}
    hooks = [FeatureHooks(model, channels) for model in (copy.deepcopy(unet), unet)]
    images = torch.randn(2, 1, 8, 8)
    for hook in hooks:
        hook.start()
    student = copy.deepcopy(unet)
    mine = FeatureHooks(student, channels)
    mine.start()
    outputs = [model(images, torch.tensor([5, 6])).sample.detach() for model in (student, unet)]
    features = tuple(zip(mine.stop(), hooks[1].stop(), strict=True))

    prediction = Prediction(torch.zeros_like(images), outputs[0], outputs[1], features)
    assert LOSSES["output"](prediction).tolist() == LOSSES["feature"](prediction).tolist() == [0, 0]


def test_the_teacher_must_be_the_model_that_was_pruned(tmp_path, unet, make_unet, pruned, scheduler):
    """The message has both hashes; a student without a plan is refused too."""
    from stages.models.layout import PLAN
    from stages.models.pipeline import write_pipeline
    from stages.storage.files import write_json

    student, plan = pruned
    write_pipeline(tmp_path / "student", student, scheduler)
    for name, model in (("right", unet), ("wrong", make_unet(seed=1))):
        write_pipeline(tmp_path / name, model, scheduler)
    device = torch.device("cpu")

    with pytest.raises(InputError, match=r"student has no pruning_plan\.json"):
        read_teacher(tmp_path / "right", tmp_path / "student", device)
    write_json(tmp_path / "student" / PLAN, plan.to_json())
    teacher, _ = read_teacher(tmp_path / "right", tmp_path / "student", device)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    with pytest.raises(InputError, match=r"student was cut from a model with sha256 [0-9a-f]{12}, .*wrong has"):
        read_teacher(tmp_path / "wrong", tmp_path / "student", device)


def test_features_that_do_not_fit_are_one_line(prediction):
    """A description of an own class may name a block without the layer whose channels it has."""
    wrong = dataclasses.replace(prediction, features=((torch.ones(3, 2, 4, 4), torch.ones(3, 5, 4, 4)),))
    with pytest.raises(InputError, match=r"\[3, 2, 4, 4\] in the cut model and \[3, 5, 4, 4\] in the dense one;"):
        LOSSES["feature"](wrong)


def test_a_block_that_returns_no_tensor_is_one_line(unet):
    """Such as an attention that returns its weights, too."""
    unet.register_module("pair", nn.Module())
    unet.pair.forward = lambda: (1, 2)
    hooks = FeatureHooks(unet, {"pair": None})
    hooks.start()
    with pytest.raises(InputError, match=r"features of pair are a tuple, no tensor; name a module in denoiser\.json"):
        unet.pair()


def test_a_loss_of_features_alone_gives_the_output_no_gradient_but_zero(prediction, scheduler):
    """Several processes wait for a gradient of every weight; the loss itself is that of the features."""
    student = prediction.student.clone().requires_grad_()
    whole = dataclasses.replace(prediction, student=student)
    found = Objective(scheduler, LossParams(noise=0, output=0, feature=1))(whole, torch.zeros(3, dtype=torch.long))
    found.sum().backward()

    torch.testing.assert_close(found, LOSSES["feature"](prediction))
    assert not student.grad.any()
