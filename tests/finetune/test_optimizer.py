"""Adam, or Muon for the weights of layers beside Adam for the rest: which moves what, and by how much."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stages.finetune.optimizer import Muon, WeightOptimizer, muon_macs, orthogonalise
from stages.finetune.params import FinetuneParams

RATE = 1e-3
PARAMS = {
    "adam": FinetuneParams(steps=1, learning_rate=RATE),
    "muon": FinetuneParams(steps=1, learning_rate=RATE, muon={"learning_rate": RATE}),
}


class Small(nn.Module):
    """A convolution, a linear layer, a norm, an embedding, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(6, 8, 3), nn.Linear(8, 12)
        self.norm, self.embedding, self.scale = nn.GroupNorm(2, 8), nn.Embedding(5, 8), nn.Parameter(torch.ones(8, 4))

    def forward(self, images, labels):
        """Images [B, 6, H, W] and labels [B] -> [B, 12]."""
        hidden = self.norm(self.conv(images)) + (self.embedding(labels) * self.scale.mean(1))[:, :, None, None]
        return self.linear(hidden.mean((2, 3)))


@pytest.fixture
def small():
    """The model with gradients of one batch."""
    torch.manual_seed(0)
    model = Small()
    model(torch.randn(64, 6, 5, 5), torch.arange(64) % 5).square().mean().backward()
    return model


def change(model, name="muon", steps=1, share=1.0):
    """Step a copy by the gradients of `model`: parameter -> its change."""
    copied = copy.deepcopy(model)
    for mine, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        mine.grad = theirs.grad.clone(memory_format=torch.preserve_format)
    optimizer = WeightOptimizer(copied, PARAMS[name])
    for _ in range(steps):
        optimizer.step(share)
    before = dict(model.named_parameters())
    return {key: (value - before[key]).detach() for key, value in copied.named_parameters()}


def test_muon_moves_every_direction_of_a_weight_matrix_alike(small):
    """Along −U Vᵀ of the gradient's SVD, U S Vᵀ; its singular values are Newton and Schulz's, between .6 and 1.3."""
    found = change(small)

    for name in ("conv", "linear"):
        gradient = small.get_submodule(name).weight.grad.flatten(1)
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        rank = torch.linalg.matrix_rank(gradient, rtol=1e-3)
        size = 0.2 * max(gradient.shape) ** 0.5 * RATE
        within = left[:, :rank].T @ (-found[f"{name}.weight"].flatten(1) / size) @ right[:rank].T
        assert rank >= 4
        assert within.diag().min() > 0.6
        assert within.diag().max() < 1.3
        torch.testing.assert_close(within, within.diag().diag(), atol=1e-3, rtol=0)


def test_muon_is_pytorchs_within_bfloat16(small):
    """Three steps of PyTorch's own, which takes matrices and computes in bfloat16."""
    found = change(small, steps=3)
    for name in ("conv.weight", "linear.weight"):
        matrix = nn.Parameter(small.get_parameter(name).detach().flatten(1).clone())
        matrix.grad = small.get_parameter(name).grad.flatten(1)
        theirs = torch.optim.Muon([matrix], lr=RATE, weight_decay=0, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            theirs.step()

        expected = matrix.detach() - small.get_parameter(name).detach().flatten(1)
        difference = (found[name].flatten(1) - expected).norm() / expected.norm()
        assert 0 < difference < 0.03


def test_a_weight_without_gradient_stays():
    """However long: the rest of its momentum has a direction, and no length that counts."""
    weight = torch.nn.Parameter(torch.ones(4, 8))
    muon = Muon([weight])
    muon.param_groups[0]["lr"] = 0.1
    weight.grad = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    muon.step()
    moved = weight.detach().clone()
    weight.grad = torch.zeros(4, 8)
    for _ in range(2500):  # until the momentum is zero
        muon.step()

    assert not torch.equal(moved, torch.ones(4, 8))
    assert torch.equal(weight.detach(), moved)


def test_muon_leaves_all_but_matrices_to_adam(small):
    """Biases, norms, embeddings and other parameters change as by Adam alone; weights of layers do not."""
    muon, adam = change(small, steps=3), change(small, "adam", steps=3)

    alike = {name for name in muon if torch.equal(muon[name], adam[name])}
    assert alike == muon.keys() - {"conv.weight", "linear.weight"}


def test_adam_is_pytorchs(small):
    """Bit by bit, for every parameter."""
    expected = copy.deepcopy(small)
    for mine, theirs in zip(expected.parameters(), small.parameters(), strict=True):
        mine.grad = theirs.grad.clone()
    torch.optim.Adam(expected.parameters(), lr=RATE, fused=True).step()

    found = change(small, "adam")
    for name, value in expected.named_parameters():
        assert torch.equal(found[name], (value - small.get_parameter(name)).detach()), name


def test_steps_of_muon_have_the_size_of_adams(small):
    """Root mean square of a change, so that one learning rate does for both."""
    muon, adam = change(small)["conv.weight"], change(small, "adam")["conv.weight"]
    ratio = muon.square().mean().sqrt() / adam.square().mean().sqrt()

    assert 0.1 < ratio < 0.4  # 0.2, as Adam's is in the middle of a training


def test_the_memory_layout_does_not_change_the_step(small):
    """NHWC weights are stepped alike, within float32's rounding."""
    plain = change(small)
    found = change(small.to(memory_format=torch.channels_last))

    assert not small.conv.weight.is_contiguous()
    assert set(found) == set(plain)
    for name, value in found.items():
        torch.testing.assert_close(value, plain[name], atol=1e-4 * float(plain[name].abs().max()), rtol=0)


def test_a_rate_of_zero_moves_nothing(small):
    """There is no weight decay."""
    assert all(not it.any() for it in change(small, share=0).values())


def test_muons_products_are_counted_exactly(small):
    """As PyTorch counts them while they run, a multiply-accumulate being two operations."""
    with FlopCounterMode(display=False) as counter:
        for weight in (small.conv.weight, small.linear.weight):
            orthogonalise(weight.detach().flatten(1))

    assert counter.get_total_flops() == 2 * muon_macs(small)


def test_each_has_its_own_learning_rate(small):
    """Both are multiplied by the schedule's share."""
    params = FinetuneParams(steps=1, learning_rate=2e-3, muon={"learning_rate": 5e-4})
    optimizer = WeightOptimizer(small, params)
    optimizer.step(0.5)

    rates = {name: {group["lr"] for group in part.param_groups} for name, part in optimizer.parts.items()}
    assert rates == {"adam": {1e-3}, "muon": {2.5e-4}}


def test_a_weight_that_two_layers_share_is_stepped_once(small):
    """As by one layer alone."""
    shared = copy.deepcopy(small)
    for mine, theirs in zip(shared.parameters(), small.parameters(), strict=True):
        mine.grad = theirs.grad.clone()
    shared.again = nn.Linear(8, 12, bias=False)
    shared.again.weight = shared.linear.weight
    WeightOptimizer(shared, PARAMS["muon"]).step(1)

    found = shared.linear.weight - small.linear.weight
    assert torch.equal(found.detach(), change(small)["linear.weight"])


def test_zero_grad_forgets_all_gradients(small):
    """Those of matrices and of the rest."""
    WeightOptimizer(small, PARAMS["muon"]).zero_grad()

    assert all(it.grad is None for it in small.parameters())


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_moments_continue_in_another_optimizer(small, name):
    """Two steps are one step, its moments loaded into a new optimizer, and one step."""
    expected, copied = change(small, name, steps=2), copy.deepcopy(small)
    for mine, theirs in zip(copied.parameters(), small.parameters(), strict=True):
        mine.grad = theirs.grad.clone()
    first = WeightOptimizer(copied, PARAMS[name])
    first.step(1)
    second = WeightOptimizer(copied, PARAMS[name])
    second.load_moments(
        {key: {part: it.clone() for part, it in state.items()} for key, state in first.moments().items()}
    )
    second.step(1)

    for key, value in copied.named_parameters():
        assert torch.equal((value - small.get_parameter(key)).detach(), expected[key]), key
