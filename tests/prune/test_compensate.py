"""Least-squares compensation."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stages.data.images import write_images
from stages.models.plan import KeptChannels
from stages.prune.compensate import (
    Moments,
    NoisyBatches,
    compensate,
    correct,
    difference,
    execution_order,
    find_parts,
    measure_moments,
    weigh_alike,
)
from stages.prune.params import CompensateParams, PruneParams
from stages.prune.pruning import prune_unet, read_calibration
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.runtime.errors import InputError

EASY = CompensateParams(num_images=8, num_timesteps=4, damping=1e-6)
"""Every layer in a round of its own, so that each sees the corrected layers before it."""
QUICK = EASY.model_copy(update={"rounds": 4})


@pytest.fixture
def plan(unet, magnitude):
    """A plan for the tiny UNet."""
    return plan_pruning(unet, magnitude, PruneParams(target={"ratio": 0.3}, compensate=QUICK))


@pytest.fixture
def batches(unet, scheduler, images):
    """Batches of noisy calibration images."""
    return list(NoisyBatches(unet, scheduler, images, EASY, 0))


def test_one_layer_is_least_squares(unet, plan, batches):
    """The corrected weight of a linear layer equals that of torch.linalg.lstsq on the same activations (reference)."""
    pruned, name = cut(unet, plan), "time_embedding.linear_2"
    rows = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, x, key=key: rows.setdefault(key, []).append(x[0]))
        for key, model in (("dense", unet), ("pruned", pruned))
    ]
    measure_moments(unet, pruned, [], batches)
    for hook in hooks:
        hook.remove()
    dense, short = (torch.cat(rows[key]).double().detach() for key in ("dense", "pruned"))
    outputs = plan.layers[name].outputs
    target = dense @ unet.time_embedding.linear_2.weight[outputs].double().T.detach()
    compensate(unet, pruned, plan, batches, EASY)
    found = short @ pruned.time_embedding.linear_2.weight.double().T.detach()
    best = short @ torch.linalg.lstsq(short, target, driver="gelsd").solution

    torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-4)


def test_a_layer_that_is_not_called_is_named(unet, plan, batches, capsys):
    """An own class may use the weights of a layer directly; the other layers are corrected."""

    class Direct(nn.Conv2d):
        """Runs no hook."""

        __call__ = nn.Conv2d.forward

    pruned = cut(unet, plan)
    unet.conv_out.__class__ = pruned.conv_out.__class__ = Direct
    before = {name: layer.weight.clone() for name, layer in pruned.named_modules() if isinstance(layer, nn.Conv2d)}
    compensate(unet, pruned, plan, batches, QUICK)

    assert "Warning: not compensated, since the model does not call them: conv_out\n" in (capsys.readouterr().err)
    assert [name for name, weight in before.items() if torch.equal(weight, pruned.get_submodule(name).weight)] == [
        "conv_in",
        "conv_out",
    ]


def test_duplicate_channels_are_compensated_exactly(make_unet, magnitude_of, scheduler, images):
    """Cutting the half of the time embedding that repeats the other half, with compensation, changes almost nothing."""
    unet = make_unet()
    with torch.no_grad():
        for parameter in (unet.time_embedding.linear_1.weight, unet.time_embedding.linear_1.bias):
            parameter[32:] = parameter[:32]
        unet.time_embedding.linear_1.weight[32:] *= 1 - 1e-4
    params = PruneParams(target={"ratio": 0.5}, include=("time_embedding.linear_1",), compensate=EASY)
    plan = plan_pruning(unet, magnitude_of(unet), params)
    batches = list(NoisyBatches(unet, scheduler, images, EASY, 0))
    plain, compensated = cut(unet, plan), cut(unet, plan)
    compensate(unet, compensated, plan, batches, EASY)

    assert difference(unet, compensated, batches) < 1e-3 * difference(unet, plain, batches)


def test_the_difference_is_the_mean_over_the_images(unet, plan, batches):
    """A short last batch counts by its images."""
    pruned, (sample, *others) = cut(unet, plan), batches[0]
    parts = [(sample[rows], *(it[rows] for it in others)) for rows in (slice(0, 3), slice(3, 4), slice(4, None))]

    assert len(sample) > 4
    assert difference(unet, pruned, parts) == pytest.approx(difference(unet, pruned, [batches[0]]), rel=1e-5)


def test_compensation_reduces_the_difference(unet, plan, batches):
    """On the batches that it was fitted to."""
    plain, compensated = cut(unet, plan), cut(unet, plan)
    compensate(unet, compensated, plan, batches, QUICK.model_copy(update={"damping": 0.1}))

    assert difference(unet, compensated, batches) < difference(unet, plain, batches)


def test_large_damping_changes_nothing(unet, plan, batches):
    """λ keeps the weights close to the uncorrected ones."""
    plain, compensated = cut(unet, plan), cut(unet, plan)
    compensate(unet, compensated, plan, batches, QUICK.model_copy(update={"damping": 1e9}))

    torch.testing.assert_close(compensated(*batches[0]).sample, plain(*batches[0]).sample)


def test_the_damping_is_a_share_of_the_mean_square_input():
    """W' = W_K + (W·E[x yᵀ] − W_K·E[y yᵀ]) · (E[y yᵀ] + λI)⁻¹, with λ = damping · tr E[y yᵀ] / 3 (closed form)."""
    inputs, kept = torch.randn(50, 5, generator=torch.Generator().manual_seed(0)).double(), [0, 2, 3]
    dense, pruned = nn.Linear(5, 4, bias=False), nn.Linear(3, 4, bias=False)
    moments = Moments(inputs.T @ inputs[:, kept], inputs[:, kept].T @ inputs[:, kept])
    correct(dense, pruned, KeptChannels(inputs=kept), moments, 0.5)
    weight = dense.weight.detach().double()
    damped = moments.square + 0.5 * moments.square.trace() / 3 * torch.eye(3)
    gap = weight @ moments.cross - weight[:, kept] @ moments.square
    expected = weight[:, kept] + gap @ torch.linalg.inv(damped)

    torch.testing.assert_close(pruned.weight.detach(), expected.float())


def test_every_layer_with_cut_inputs_is_corrected(unet, plan, batches):
    """No other layer is."""
    short = {
        name
        for name, kept in plan.layers.items()
        if kept.inputs is not None and len(kept.inputs) < unet.get_submodule(name).weight.shape[1]
    }
    assert short == set(execution_order(unet, plan, batches[0]))


def test_the_same_seed_gives_the_same_weights(unet, scheduler, images, plan):
    """Another seed gives others."""
    draws = [NoisyBatches(unet, scheduler, images, QUICK, seed) for seed in (0, 0, 1)]
    found = [prune_unet(unet, plan, drawn).conv_out.weight for drawn in draws]

    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_layers_are_corrected_one_by_one_unless_rounds_are_given(unet, plan, batches):
    """As many rounds as there are parts are the same; fewer give other weights."""
    parts = len(find_parts(unet, plan, batches[0], None))
    found = []
    for rounds in (None, parts, 1):
        pruned = cut(unet, plan)
        compensate(unet, pruned, plan, batches, EASY.model_copy(update={"rounds": rounds}))
        found.append(pruned.conv_out.weight)

    assert CompensateParams(num_images=1, num_timesteps=1).rounds is None
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_there_are_at_most_as_many_parts_as_rounds(unet, plan, batches):
    """Also where the layers cannot be divided evenly."""
    most = len(find_parts(unet, plan, batches[0], None))
    found = [len(find_parts(unet, plan, batches[0], rounds)) for rounds in range(1, most + 1)]

    assert all(parts <= rounds for rounds, parts in enumerate(found, 1))
    assert (found[0], found[-1]) == (1, most)


def test_layers_with_equal_inputs_are_one_part(unet, plan, batches):
    """To the bits of correcting every layer in a pass of its own, from the first layer to the last."""
    compensated, one_by_one = cut(unet, plan), cut(unet, plan)
    compensate(unet, compensated, plan, batches, EASY)
    parts = find_parts(unet, plan, batches[0], None)
    for name in execution_order(unet, plan, batches[0]):
        moments = measure_moments(unet, one_by_one, [name], batches)[name]
        correct(unet.get_submodule(name), one_by_one.get_submodule(name), plan.layers[name], moments, EASY.damping)
    shared = next(part.names for part in parts if any(name.endswith("to_q") for name in part.names))

    assert [name.rpartition(".")[2] for name in shared] == ["to_q", "to_k", "to_v"]
    assert sum(part.calls for part in parts) == sum(len(part.names) for part in parts)
    assert all(torch.equal(one_by_one.state_dict()[name], it) for name, it in compensated.state_dict().items())


def test_compensation_is_judged_on_other_images_and_timesteps(unet, scheduler, images, plan, capsys):
    """The printed differences are those on them, not those on the images of the fit, the second of which is smaller."""
    batches = NoisyBatches(unet, scheduler, images, EASY, 0)
    before = difference(unet, cut(unet, plan), batches.held_out)
    fitted, judged = batches.images.flatten(1), batches.held_out.images.flatten(1)
    pruned = prune_unet(unet, plan, batches)
    shown = capsys.readouterr().out
    on_others, on_fitted = (difference(unet, pruned, noisy) for noisy in (batches.held_out, batches))

    assert torch.cdist(fitted, judged).min() > 0
    assert (batches.timesteps, batches.held_out.timesteps) == ([125, 375, 625, 875], [100, 300, 500, 700, 900])
    assert on_fitted < on_others
    assert f"prediction {before:.3g} -> {on_others:.3g} on held-out images and timesteps" in shown


def test_compensation_needs_images_that_fit(tmp_path, unet, make_unet, scheduler, images):
    """Missing, too few or of another size, they are refused."""
    write_images(tmp_path, images, {})
    too_many = EASY.model_copy(update={"num_images": 25})

    with pytest.raises(InputError, match="compensate needs calibration images; give them with --data"):
        read_calibration(unet, scheduler, None, EASY, 0)
    with pytest.raises(InputError, match=r"prune\.compensate\.num_images 25 is more than the 24 training images"):
        read_calibration(unet, scheduler, tmp_path, too_many, 0)
    with pytest.raises(InputError, match="holds 1×8×8 images, the model generates 3×8×8"):
        read_calibration(make_unet(in_channels=3, out_channels=3), scheduler, tmp_path, EASY, 0)


def test_a_layer_with_zero_inputs_is_compensated(make_unet, magnitude_of, scheduler, images):
    """Its weights stay finite."""
    unet = make_unet()
    with torch.no_grad():
        unet.time_embedding.linear_1.weight.zero_()
        unet.time_embedding.linear_1.bias.zero_()
    params = PruneParams(target={"ratio": 0.3}, compensate=QUICK)
    plan = plan_pruning(unet, magnitude_of(unet), params)
    pruned = prune_unet(unet, plan, NoisyBatches(unet, scheduler, images, QUICK, 0))

    assert all(parameter.isfinite().all() for parameter in pruned.parameters())


def test_noisy_batches_can_be_iterated_twice(unet, scheduler, images):
    """With the same values, at most sixteen images at once."""
    batches = NoisyBatches(unet, scheduler, images, EASY.model_copy(update={"num_images": 24}), 0)
    first, second = ([noisy for noisy, _ in batches] for _ in range(2))

    assert [len(noisy) for noisy in first] == [16, 8] * EASY.num_timesteps
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_timesteps_and_images_have_noise_of_their_own(unet, scheduler, images):
    """Each pair of them."""
    batches = NoisyBatches(unet, scheduler, images, EASY, 0)
    signals = scheduler.alphas_cumprod[batches.timesteps]
    noises = [
        (noisy - signal.sqrt() * batches.images) / (1 - signal).sqrt()
        for signal, (noisy, _) in zip(signals, batches, strict=True)
    ]

    assert len(batches) == 4
    assert torch.pdist(torch.cat(noises).flatten(1)).min() > 1


def test_compensation_that_does_harm_is_refused(unet, scheduler, images, plan):
    """One image of white noise at one timestep says nothing about others; without damping all of it is fitted."""
    noise = torch.randint(0, 256, images.train.shape, generator=torch.Generator().manual_seed(0))
    params = CompensateParams(num_images=1, num_timesteps=1, damping=1e-6, rounds=1)
    batches = NoisyBatches(unet, scheduler, replace(images, train=noise.numpy().astype("uint8")), params, 0)

    with pytest.raises(InputError, match=r"does harm: .* -> \S+ on held-out images; raise its damping, num_images or"):
        prune_unet(unet, plan, batches)


def test_a_difference_that_is_not_a_number_is_harm(make_unet, magnitude_of, scheduler, images):
    """Of models that fail at a timestep on which the compensation is judged."""
    unet = make_unet(time_embedding_type="learned", num_train_timesteps=1000)
    plan = plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.3}, compensate=QUICK))
    with torch.no_grad():
        unet.time_proj.weight[100] = 1e38

    with pytest.raises(InputError, match=r"does harm: .* nan -> nan on held-out images"):
        prune_unet(unet, plan, NoisyBatches(unet, scheduler, images, QUICK, 0))


def test_a_model_that_predicts_nothing_can_be_compensated(make_unet, magnitude_of, scheduler, images):
    """Both differences are zero where the last layer is."""
    unet = make_unet()
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    plan = plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.3}, compensate=QUICK))

    assert prune_unet(unet, plan, NoisyBatches(unet, scheduler, images, QUICK, 0)).conv_out.weight.count_nonzero() == 0


@pytest.fixture
def small_plan(unet, magnitude):
    """A plan that cuts the inputs of one linear layer and of one convolution, to compensate in a moment."""
    inner = ("time_embedding.linear_1", "mid_block.resnets.0.conv1", "mid_block.resnets.0.time_emb_proj")
    return plan_pruning(unet, magnitude, PruneParams(target={"ratio": 0.3}, include=inner, compensate=QUICK))


@pytest.fixture
def corrected(unet, small_plan):
    """Compensate the small cut with these weights: the tensors of the pruned model."""

    def do(batches, weigh):
        pruned = cut(unet, small_plan)
        compensate(unet, pruned, small_plan, batches, QUICK.model_copy(update={"damping": 0.1}), weigh)
        return pruned.state_dict()

    return do


def test_equal_weights_are_no_weights(corrected, batches):
    """A weight of one changes no bit; a power of two, which is exact, neither."""
    found = [corrected(batches, weigh) for weigh in (weigh_alike, lambda _: 1.0, lambda _: 4.0)]

    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in other)


def test_timesteps_of_weight_zero_do_not_count(corrected, batches):
    """Compensation on the other timesteps alone gives the same weights (independence)."""
    chosen = {int(timesteps[0]) for _, timesteps in batches[: len(batches) // 2]}
    half = [batch for batch in batches if int(batch[1][0]) in chosen]
    weighted = corrected(batches, lambda timestep: float(timestep in chosen))
    expected, all_alike = (corrected(part, weigh_alike) for part in (half, batches))

    assert 0 < len(half) < len(batches)
    assert all(torch.equal(weighted[name], expected[name]) for name in expected)
    assert any(not torch.equal(weighted[name], all_alike[name]) for name in all_alike)


def test_a_weight_of_two_counts_a_timestep_twice(unet, small_plan, batches):
    """The moments, and the mean difference, are those of a list that holds its batches twice (closed form)."""
    first = int(batches[0][1][0])
    twice = [batch for batch in batches for _ in range(2 if int(batch[1][0]) == first else 1)]
    pruned, names = cut(unet, small_plan), list(execution_order(unet, small_plan, batches[0]))

    def weigh(timestep):
        return 2.0 if timestep == first else 1.0

    found, expected = measure_moments(unet, pruned, names, batches, weigh), measure_moments(unet, pruned, names, twice)
    assert names == ["time_embedding.linear_2", "mid_block.resnets.0.conv2"]
    for name in names:
        torch.testing.assert_close(found[name].cross, expected[name].cross, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[name].square, expected[name].square, rtol=1e-12, atol=1e-12)
    assert difference(unet, pruned, batches, weigh) == pytest.approx(difference(unet, pruned, twice), rel=1e-12)


@pytest.mark.parametrize(
    ("early_weight", "expected"), [(1.0, [1, 1, 1]), (100.0, [1, 10, 100]), (0.25, [1, 0.5, 0.25])]
)
def test_weights_grow_towards_the_noisy_timesteps(unet, scheduler, images, early_weight, expected):
    """w(t) = early_weight^(t / last): the last step of sampling weighs one, the first early_weight (closed form)."""
    params = EASY.model_copy(update={"early_weight": early_weight, "num_timesteps": 3})
    batches = NoisyBatches(unet, scheduler, images, params, 0)
    last = scheduler.config["num_train_timesteps"] - 1

    assert [batches.weigh(timestep) for timestep in (0, last / 2, last)] == pytest.approx(expected)
    assert CompensateParams(num_images=1, num_timesteps=1).early_weight == 1


def test_early_weight_reaches_the_pruned_model(unet, scheduler, images, small_plan, capsys):
    """Another weight gives another model, and the differences that are printed have the same weights."""
    texts, weights = [], []
    for changes in ({}, {"early_weight": 1000.0}):
        params = QUICK.model_copy(update={"damping": 0.1, **changes})
        batches = NoisyBatches(unet, scheduler, images, params, 0)
        pruned = prune_unet(unet, small_plan, batches)
        weights.append(pruned.mid_block.resnets[0].conv2.weight)
        texts.append(capsys.readouterr().out)
        before, after = (
            difference(unet, model, batches.held_out, batches.weigh) for model in (cut(unet, small_plan), pruned)
        )
        assert f"prediction {before:.3g} -> {after:.3g} on held-out" in texts[-1]

    assert not torch.equal(*weights)
    assert texts[0] != texts[1]


class Twice(nn.Module):
    """A linear layer that reads [N, H, W, C], and is called twice."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, 2)

    def forward(self, sample, timestep):
        """Sum over two inputs."""
        del timestep
        return SimpleNamespace(sample=self.layer(sample) + self.layer(2 * sample))


def test_a_linear_layer_reads_the_last_axis_at_every_call():
    """An own class may hold channels last, and call a layer again."""
    sample = torch.randn(2, 5, 5, 3, generator=torch.Generator().manual_seed(0))
    batch = (sample, torch.zeros(2, dtype=torch.long))
    dense, twice = Twice(3), Twice(3)
    found = measure_moments(dense, twice, ["layer"], [batch])["layer"]
    rows = sample.reshape(-1, 3).double()

    torch.testing.assert_close(found.square, 5 * rows.T @ rows)
    torch.testing.assert_close(found.cross, 5 * rows.T @ rows)
