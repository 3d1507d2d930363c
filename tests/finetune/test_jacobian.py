"""Second-order Jacobian matching, against its formula."""

import copy

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.models.attention_processor import Attention, AttnProcessor
from pydantic import ValidationError
from torch import nn

from stages.finetune import trainer
from stages.finetune.batches import Batch
from stages.finetune.jacobian import JacobianMatching
from stages.finetune.launch import count_gpus
from stages.finetune.params import EngineParams, JacobianParams, LossParams
from stages.finetune.trainer import Trainer
from stages.runtime.errors import InputError


@pytest.fixture
def start(unet, scheduler, images, short_training):
    """Return a function that builds a trainer of a model that differs from its teacher; keywords change its params."""

    def build(jacobian=None, *, teacher=unet, data=images, noise=0.01, loss=(), engine=(), **changes):
        AcceleratorState._reset_state()  # accelerate sets the precision once per process
        jacobian = JacobianParams(**{"weight": 0.1, **(jacobian or {})})
        weights = LossParams(**{"noise": 1, "output": 1, "jacobian": jacobian, **dict(loss)})
        params = short_training(steps=8, loss=weights, engine=EngineParams(**dict(engine)), **changes)
        student, draws = copy.deepcopy(teacher), torch.Generator().manual_seed(0)
        for parameter in student.parameters():
            parameter.data += noise * torch.randn(parameter.shape, generator=draws)
        return Trainer(student, scheduler, data, params, 0, (copy.deepcopy(teacher), {}))

    return build


def gradients(run):
    """Gradients of the student's weights, by name."""
    return {name: weight.grad for name, weight in run.unet.named_parameters() if weight.grad is not None}


def accumulate_jacobian(run, step=0):
    """Compute the gradients of the Jacobian loss alone, part by part; return its loss and the gradients."""
    run.unet.zero_grad()
    parts = run.batches.at(step, run.rows).split(run.part_size)
    losses = [
        run.jacobian.backward(part, vectors, step)
        for part, vectors in zip(parts, run.jacobian.vectors(step), strict=True)
    ]
    return float(sum(losses)), gradients(run)


def summed_loss(run, batch, vectors, weight):
    """The published form: every term summed over the pixels, then the mean over the batch."""
    noisy = run.scheduler.add_noise(batch.images, batch.noise, batch.timesteps)
    table = run.distillation.table
    condition = {} if table is None else {"encoder_hidden_states": table[batch.labels]}
    predictions, norms = [], []
    for model in (run.distillation.teacher, run.unet):
        for layer in model.modules():
            if isinstance(layer, Attention):
                layer.set_processor(AttnProcessor())  # plain products, written out
        given = noisy.clone().requires_grad_()
        predictions.append(model(given, batch.timesteps, **condition).sample)
        product = (predictions[-1] * vectors).sum()
        (jacobian,) = torch.autograd.grad(product, given, create_graph=True)
        norms.append(jacobian.pow(2).sum((1, 2, 3)))
    noise = (batch.noise - predictions[1]).pow(2).sum((1, 2, 3))
    output = (predictions[0].detach() - predictions[1]).pow(2).sum((1, 2, 3))
    return (noise + output + weight * (norms[0].detach() - norms[1]).pow(2)).mean()


@pytest.mark.parametrize("kind", ["unconditional", "conditional"])
def test_the_gradients_are_those_of_the_summed_form(start, request, kind):
    """Divided by D = C·H·W: the published weight 0.1 beside sums over pixels is 0.1 beside our means."""
    is_conditional = kind == "conditional"
    models = {"teacher": request.getfixturevalue("conditional"), "data": request.getfixturevalue("latents")}
    run = start({"weight": 30.0}, **models if is_conditional else {})
    run._accumulate(0)
    found = {name: grad.clone() for name, grad in gradients(run).items()}
    batch, (vectors,) = run.batches.at(0, run.rows), run.jacobian.vectors(0)
    run.unet.zero_grad()
    summed_loss(run, batch, vectors[:, 0], 30.0).backward()
    expected = {name: grad / batch.images[0].numel() for name, grad in gradients(run).items()}
    run.jacobian = None
    run._accumulate(0)
    largest = max(float((found[name] - grad).abs().max()) for name, grad in gradients(run).items())

    assert largest > 1e-3  # the Jacobian term is seen
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5)


class Linear(nn.Module):
    """y = A x for images of one row."""

    def __init__(self, matrix):
        super().__init__()
        self.config = {"sample_size": (1, len(matrix)), "in_channels": 1}
        self.matrix = nn.Parameter(matrix)

    def forward(self, sample, _timestep, return_dict):
        """Multiply each image by A."""
        assert not return_dict
        return (sample @ self.matrix.T,)


def test_a_linear_model_has_a_closed_form(start):
    """J = Aᵀv, so L = (‖A_tᵀv‖² − ‖A_sᵀv‖²)² / D and ∂L/∂A_s = −4 (‖A_tᵀv‖² − ‖A_sᵀv‖²) v vᵀ A_s / D."""
    run = start()
    mine, theirs = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0))
    model = Linear(mine)
    matching = JacobianMatching(model, Linear(theirs), run.distillation, run.objective, run.params, 0)
    vectors = matching.vectors(0)[0]
    noisy, numbers = torch.randn(8, 1, 1, 6), torch.zeros(8, dtype=torch.long)
    losses = matching(Batch(noisy, noisy, numbers, numbers), vectors)
    losses.sum().backward()
    v = vectors.view(8, 6)
    difference = (v @ theirs).square().sum(1) - (v @ mine).square().sum(1)
    expected = sum(-4 / 6 * gap * torch.outer(each, each @ mine) for gap, each in zip(difference, v, strict=True))

    torch.testing.assert_close(losses, difference.square() / 6)
    torch.testing.assert_close(model.matrix.grad, expected, rtol=1e-4, atol=1e-5)


def test_a_copy_of_the_teacher_has_no_loss(start):
    """Identity: loss and gradients are 0 within float32's rounding, beside those of a student that differs."""
    loss, found = accumulate_jacobian(start({"vectors": 2}, noise=0))
    usual_loss, usual = accumulate_jacobian(start({"vectors": 2}))

    assert loss < 1e-9 * usual_loss
    assert found.keys() == usual.keys()
    assert max(float(grad.abs().max()) for grad in found.values()) < 1e-4 * float(usual["conv_in.weight"].abs().max())


def test_the_vectors_have_unit_length_and_a_seed_for_each_step(start):
    """Their directions are independent: the mean of v·w over pairs is 0, that of its square 1 / D."""
    run = start({"vectors": 4})
    vectors = torch.cat([run.jacobian.vectors(step)[0] for step in range(8)]).flatten(0, 1).flatten(1)
    products = (vectors @ vectors.T)[~torch.eye(len(vectors), dtype=torch.bool)]

    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(8 * 8 * 4))
    assert float(products.mean()) == pytest.approx(0, abs=1e-3)
    assert float(products.square().mean()) == pytest.approx(1 / 64, rel=0.05)
    assert torch.equal(start({"vectors": 4}).jacobian.vectors(3)[0], run.jacobian.vectors(3)[0])


def test_each_kth_step_counts_k_times(start):
    """Over k steps the weight is the same; the loss of the other steps is that without the term."""
    whole, fourth, plain = start(), start({"every": 4}), start()
    plain.jacobian = None
    loss, expected = accumulate_jacobian(whole, step=3)
    loss_of_fourth, found = accumulate_jacobian(fourth, step=3)

    assert loss > 0
    assert [bool(fourth.jacobian.vectors(step)) for step in range(8)] == [False, False, False, True] * 2
    assert loss_of_fourth == pytest.approx(4 * loss, rel=1e-6)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], 4 * grad)
    for run in (fourth, plain):
        run._accumulate(2)
    assert all(torch.equal(grad, gradients(plain)[name]) for name, grad in gradients(fourth).items())
    assert JacobianParams(weight=0.1, every=2, ramp_steps=8).weight_at(3) == pytest.approx(0.1 * 2 * 4 / 8)
    assert [JacobianParams(weight=1, ramp_steps=4).weight_at(step) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


def test_several_vectors_are_averaged(start):
    """The loss of an image with two vectors is the mean of those with one."""
    run = start({"vectors": 2})
    batch, (vectors,) = run.batches.at(0, run.rows), run.jacobian.vectors(0)
    each = [run.jacobian(batch, vectors[:, [index]]) for index in (0, 1)]

    torch.testing.assert_close(run.jacobian(batch, vectors), (each[0] + each[1]) / 2)


def test_the_relative_loss_does_not_depend_on_scale(start):
    """(1 − ‖J_s‖² / ‖J_t‖²)² is the same if the outputs of both models are a hundred times as large."""
    run = start({"relative": True})
    batch, (vectors,) = run.batches.at(0, run.rows), run.jacobian.vectors(0)
    theirs, mine = (
        run.jacobian.squared_norms(model, batch, vectors, differentiable=False)
        for model in (run.jacobian.teacher, run.jacobian.student)
    )
    losses = run.jacobian(batch, vectors)
    for model in (run.unet, run.distillation.teacher):
        model.conv_out.weight.data *= 100

    torch.testing.assert_close(losses, ((theirs - mine) / theirs).square().mean(1), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(run.jacobian(batch, vectors), losses, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("num_images", [None, 4])
def test_parts_give_the_gradients_of_the_whole(start, num_images):
    """However processes and parts divide the batch, the same images get the same vectors."""
    loss, expected = accumulate_jacobian(start({"images": num_images}))
    for processes, parts in ((1, 4), (2, 1), (2, 2)):
        shares = []
        for index in range(processes):
            run = start({"images": num_images}, engine={"accumulate": parts})
            run.engine.num_processes, run.engine.index = processes, index
            run.rows = run.engine.local_rows(8)
            run.part_size = 8 // processes // parts
            run.jacobian = JacobianMatching(
                run.unet, run.jacobian.teacher.args[0], run.distillation, run.objective, run.params, 0
            )
            shares.append(accumulate_jacobian(run))

        assert sum(share for share, _ in shares) / processes == pytest.approx(loss, rel=1e-4)
        for name, grad in expected.items():
            found = sum(grads[name] for _, grads in shares) / processes
            torch.testing.assert_close(found, grad, rtol=1e-3, atol=1e-6)


def test_min_snr_weighs_the_jacobian_loss_too(start):
    """w(t) multiplies the sum of all losses."""
    run = start(loss={"min_snr": 5})
    batch, (vectors,) = run.batches.at(0, run.rows), run.jacobian.vectors(0)
    alpha = run.scheduler.alphas_cumprod[batch.timesteps]
    snr = alpha / (1 - alpha)
    expected = 0.1 * (snr.clamp(max=5) / snr * run.jacobian(batch, vectors)).mean()

    torch.testing.assert_close(run.jacobian.backward(batch, vectors, 0), expected.detach())


@pytest.mark.parametrize(
    "engine",
    [
        {"precision": "bfloat16"},
        {"gradient_checkpointing": True},
        {"channels_last": True},
        {"compile": True},  # accelerate wraps the model; nothing is traced
    ],
    ids=str,
)
def test_the_engine_leaves_the_jacobian_loss_in_float32(start, engine):
    """In bfloat16, compiled or with recomputed activations the numbers are those of the plain model."""
    loss, expected = accumulate_jacobian(start())
    found_loss, found = accumulate_jacobian(start(engine=engine))

    assert found_loss == pytest.approx(loss, rel=1e-5)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6)


def test_only_losses_that_need_it_run_the_teacher_in_every_step(start):
    """Beside the noise loss alone, the dense model serves the Jacobian; the held-out loss leaves that out."""
    run = start(loss={"output": 0}, jacobian={"every": 2})
    calls = []
    run.jacobian.teacher = lambda *_, **__: calls.append(1)

    assert run.params.loss.needs_teacher
    assert run.distillation.teacher is None
    assert run.params.loss.without_features() == LossParams()
    run._accumulate(0)
    assert not calls


@pytest.mark.parametrize(
    ("jacobian", "changes", "message"),
    [
        ({"images": 3}, {}, r"loss\.jacobian\.images 3 does not divide batch_size 8"),
        ({"images": 16}, {}, r"loss\.jacobian\.images 16 does not divide batch_size 8"),
        ({"images": 2}, {"engine": {"accumulate": 4}}, r"accumulate 4 does not divide loss\.jacobian\.images 2"),
        ({"every": 9}, {}, r"loss\.jacobian\.every 9 must not exceed steps 8"),
        ({"ramp_steps": 8}, {}, r"loss\.jacobian\.ramp_steps 8 must be less than steps 8"),
        ({"weight": 0}, {}, "greater than 0"),
        ({}, {"loss": {"noise": 0, "output": 0}}, "noise, output and feature are all 0"),
    ],
)
def test_values_that_do_not_fit_are_refused(start, jacobian, changes, message):
    """The message has the key, what was found and what is allowed."""
    with pytest.raises(ValidationError, match=message):
        start(jacobian, **changes)


def test_images_that_do_not_divide_by_the_processes_are_refused(start):
    """The key of the message is that of the smaller number."""
    run = start({"images": 2})
    run.engine.num_processes = 4
    with pytest.raises(InputError, match=r"loss\.jacobian\.images 2 does not divide by 4 processes of 1 parts each"):
        JacobianMatching(run.unet, run.jacobian.teacher.args[0], run.distillation, run.objective, run.params, 0)
    assert count_gpus(8, 2, 1, run.params.divided[0]) == 2


def test_the_forecast_is_the_mean_over_steps(start, monkeypatch):
    """Of five remaining steps, from the fourth on, two have the Jacobian loss: at 10 s beside 1 s."""
    run = start({"every": 4})
    run.steps_done = 3
    monkeypatch.setattr(run, "_accumulate", lambda step: 10.0 if run.jacobian.vectors(step) else 1.0)
    monkeypatch.setattr(trainer, "elapsed_s", lambda function: function())

    assert run.mean_step_s() == pytest.approx((2 * 10 + 3 * 1) / 5)
    run.steps_done = 8  # stopped after its last step
    assert run.mean_step_s() == 1
