"""Closed-form compensation."""

import pytest
import torch

from stages.data.images import write_images
from stages.prune.compensate import NoisyImages, compensate, difference, measure_moments, running_order
from stages.prune.params import CompensateParams, PruneParams
from stages.prune.pruning import calibration, prune_unet
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.runtime.errors import InputError

EASY = CompensateParams(num_images=8, num_timesteps=4, damping=1e-6, rounds=100)


@pytest.fixture
def plan(unet, magnitude):
    """A plan of the tiny UNet."""
    return plan_pruning(unet, magnitude, PruneParams(target={"ratio": 0.3}, compensate=EASY))


@pytest.fixture
def batches(unet, scheduler, images):
    """Noisy calibration images."""
    return list(NoisyImages(unet, scheduler, images, EASY, 0))


def test_one_layer_is_least_squares(unet, plan, batches):
    """The corrected weight of a linear layer is what torch.linalg.lstsq finds on the same activations."""
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
    wanted = dense @ unet.time_embedding.linear_2.weight[outputs].double().T.detach()
    compensate(unet, pruned, plan, batches, EASY)
    found = short @ pruned.time_embedding.linear_2.weight.double().T.detach()
    best = short @ torch.linalg.lstsq(short, wanted, driver="gelsd").solution

    torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-4)


def test_channels_that_repeat_others_are_made_up_for(make_unet, magnitude_of, scheduler, images):
    """Half of the time embedding copies the other half: cutting the copies, compensated, changes nothing."""
    unet = make_unet()
    with torch.no_grad():
        for parameter in (unet.time_embedding.linear_1.weight, unet.time_embedding.linear_1.bias):
            parameter[32:] = parameter[:32]
        unet.time_embedding.linear_1.weight[32:] *= 1 - 1e-4
    params = PruneParams(target={"ratio": 0.5}, include=("time_embedding.linear_1",), compensate=EASY)
    plan = plan_pruning(unet, magnitude_of(unet), params)
    batches = list(NoisyImages(unet, scheduler, images, EASY, 0))
    plain, helped = cut(unet, plan), cut(unet, plan)
    compensate(unet, helped, plan, batches, EASY)

    assert difference(unet, helped, batches) < 1e-3 * difference(unet, plain, batches)


def test_it_brings_the_model_closer(unet, plan, batches):
    """On the activations that it was fitted to."""
    plain, helped = cut(unet, plan), cut(unet, plan)
    compensate(unet, helped, plan, batches, EASY.model_copy(update={"damping": 0.1}))

    assert difference(unet, helped, batches) < difference(unet, plain, batches)


def test_much_damping_changes_nothing(unet, plan, batches):
    """λ draws towards the weights as they are."""
    plain, helped = cut(unet, plan), cut(unet, plan)
    compensate(unet, helped, plan, batches, EASY.model_copy(update={"damping": 1e9}))

    torch.testing.assert_close(helped(*batches[0]).sample, plain(*batches[0]).sample)


def test_every_layer_with_cut_inputs_is_corrected(unet, plan, batches):
    """And no other."""
    short = {
        name
        for name, kept in plan.layers.items()
        if kept.inputs is not None and len(kept.inputs) < unet.get_submodule(name).weight.shape[1]
    }
    assert short == set(running_order(unet, plan, batches[0]))


def test_the_same_seed_gives_the_same_weights(unet, scheduler, images, plan):
    """And another seed others."""
    draws = [NoisyImages(unet, scheduler, images, EASY, seed) for seed in (0, 0, 1)]
    found = [prune_unet(unet, plan, drawn).conv_out.weight for drawn in draws]

    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_it_needs_images(tmp_path, unet, make_unet, scheduler, images):
    """As many as it asks for, and of the model's size, before anything is cut."""
    params = PruneParams(target={"ratio": 0.3}, compensate=EASY)
    write_images(tmp_path, images, {})
    few = params.model_copy(update={"compensate": EASY.model_copy(update={"num_images": 25})})

    with pytest.raises(InputError, match="compensate needs calibration images; give them with --data"):
        calibration(unet, scheduler, None, params, 0)
    with pytest.raises(InputError, match=r"prune\.compensate\.num_images 25 is more than the 24 training images"):
        calibration(unet, scheduler, tmp_path, few, 0)
    with pytest.raises(InputError, match="holds 1×8×8 images, the model draws 3×8×8"):
        calibration(make_unet(in_channels=3, out_channels=3), scheduler, tmp_path, params, 0)


def test_a_layer_that_is_never_fed_does_no_harm(make_unet, magnitude_of, scheduler, images):
    """All of its inputs are zero: nothing can be learned from them, and nothing breaks."""
    unet = make_unet()
    with torch.no_grad():
        unet.time_embedding.linear_1.weight.zero_()
        unet.time_embedding.linear_1.bias.zero_()
    params = PruneParams(target={"ratio": 0.3}, compensate=EASY)
    plan = plan_pruning(unet, magnitude_of(unet), params)
    pruned = prune_unet(unet, plan, NoisyImages(unet, scheduler, images, EASY, 0))

    assert all(parameter.isfinite().all() for parameter in pruned.parameters())


def test_batches_are_drawn_anew_and_small(unet, scheduler, images):
    """Twice the same, and never more than sixteen images at once."""
    drawn = NoisyImages(unet, scheduler, images, EASY.model_copy(update={"num_images": 24}), 0)
    first, second = ([noisy for noisy, _ in drawn] for _ in range(2))

    assert [len(noisy) for noisy in first] == [16, 8] * EASY.num_timesteps
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_what_does_not_help_is_not_kept(unet, scheduler, images, magnitude, capsys, monkeypatch):
    """Where the corrected model is no closer to the dense one, the weights stay as they were cut; a line says so."""
    from stages.prune import pruning

    monkeypatch.setattr(pruning, "difference", lambda *_: 1.0)
    plan = plan_pruning(unet, magnitude, PruneParams(target={"ratio": 0.3}, compensate=EASY))
    kept = prune_unet(unet, plan, NoisyImages(unet, scheduler, images, EASY, 0))

    assert torch.equal(kept.conv_out.weight, cut(unet, plan).conv_out.weight)
    assert "no closer, so the weights stay as they were cut" in capsys.readouterr().err
