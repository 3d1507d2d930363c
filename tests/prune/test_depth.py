"""Removal of residual branches: their shortcuts stay, and what goes is chosen by a measured order."""

import copy
from dataclasses import replace
from itertools import islice

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from stages.models.branches import bypassed, find_branches, most_removable, record_removal, removable, without_branches
from stages.models.complexity import count_macs, count_params
from stages.models.families import example_inputs
from stages.models.pipeline import unet_config
from stages.prune.branch_order import measure_similarity, order_branches, order_greedily, score_branches
from stages.prune.calibration import CalibrationBatches
from stages.prune.depth import plan_depth
from stages.prune.kept import check_plan
from stages.prune.params import DepthParams, PruneParams
from stages.prune.surgery import cut

CALIBRATION = {"num_images": 4, "num_timesteps": 2}
MIDDLE = ["mid_block.resnets.0", "mid_block.attentions.0"]


def depth(remove, target=None, **chosen):
    """The block prune with depth."""
    block = {"remove": remove, **CALIBRATION, **chosen}
    return PruneParams(target=target or {"ratio": 0}, depth=block)


def zero_branch(unet, name):
    """Set the last layer of a branch to zero, in place."""
    module = unet.get_submodule(name)
    if isinstance(module, ResnetBlock2D):
        last = module.conv2
    else:
        last = module.to_out[0] if isinstance(module, Attention) else module.proj_out
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.zeros_(last.bias)


def predict(unet):
    """Predict for seeded noise."""
    inputs = example_inputs(unet, 2)
    draws = torch.Generator().manual_seed(0)
    noise = {
        name: torch.randn(value.shape, generator=draws) if value.is_floating_point() else value + 7
        for name, value in inputs.items()
    }
    with torch.no_grad():
        return unet(**noise).sample


@pytest.fixture
def batches(unet, scheduler, images):
    """Eight noisy images of two timesteps."""
    params = DepthParams(remove=1, **CALIBRATION)
    return CalibrationBatches(unet, scheduler, images, params, 0, purpose="depth", key="prune.depth")


def test_a_removed_branch_is_one_whose_last_layer_is_zero(make_unet, conditional):
    """For every branch of both families, with and without a convolution in the shortcut or a scale behind it."""
    for dense in (make_unet(mid_block_scale_factor=2), conditional):
        for branch in find_branches(dense):
            zero = copy.deepcopy(dense)
            zero_branch(zero, branch.name)

            torch.testing.assert_close(predict(without_branches(dense, [branch.name])), predict(zero))


def test_every_kind_of_branch_is_found(unet, conditional):
    """Resnets and self-attentions of a UNet, and transformers of a conditional one, in the order of the parts."""
    assert {branch.kind for branch in find_branches(unet)} == {"resnet", "attention"}
    assert {branch.kind for branch in find_branches(conditional)} == {"resnet", "transformer"}
    names = [branch.name for branch in find_branches(unet)]
    assert names.index("mid_block.resnets.0") < names.index("up_blocks.0.resnets.0")


def test_what_a_removal_saves_is_the_difference_of_the_counts(unet, conditional):
    """Of MACs and parameters, for each branch, and their sum for several."""
    for dense in (unet, conditional):
        names = [branch.name for branch in find_branches(dense)][::2]
        records = record_removal(dense, names)
        shallow = without_branches(dense, names)
        assert sum(record.macs for record in records) == count_macs(dense) - count_macs(shallow)
        assert sum(record.params for record in records) == count_params(dense) - count_params(shallow)


def test_one_reader_of_timestep_and_condition_stays(unet, conditional):
    """However many go, one resnet stays, and in a conditional model also one transformer."""
    assert most_removable(find_branches(unet)) == len(find_branches(unet)) - 1
    assert most_removable(find_branches(conditional)) == len(find_branches(conditional)) - 2
    resnets = [branch.name for branch in find_branches(unet) if branch.kind == "resnet"]
    assert resnets[-1] not in [branch.name for branch in removable(find_branches(unet), resnets[:-1])]


def test_greedy_is_a_plain_loop_over_the_change_of_the_prediction(unet, batches):
    """Every branch is tried by zeroing its last layer in a copy; the one that changes least goes, then all anew."""
    found, removed = [branch.name for branch in find_branches(unet)], []
    order = order_greedily(unet, batches)
    for _ in range(3):
        changes = {}
        for name in found:
            if name not in removed:
                without = copy.deepcopy(unet)
                for gone in (*removed, name):
                    zero_branch(without, gone)
                with torch.no_grad():
                    pairs = [(unet(*batch).sample, without(*batch).sample) for batch in batches]
                changes[name] = sum(float((one - two).square().sum()) for one, two in pairs)
        removed.append(min(changes, key=changes.get))
        assert next(order) == removed[-1]


def test_the_similarity_is_the_cosine_of_shortcut_and_output(unet, batches):
    """1 for a branch whose output is zero, −1 for one that turns its input round, and else as computed by hand."""
    zero_branch(unet, "mid_block.resnets.0")
    found = measure_similarity(unet, batches)
    assert found["mid_block.resnets.0"] == pytest.approx(1, abs=1e-7)
    name, seen = "up_blocks.0.resnets.0", []
    resnet = unet.get_submodule(name)
    resnet.register_forward_hook(lambda _, inputs, output: seen.append((resnet.conv_shortcut(inputs[0]), output)))
    with torch.no_grad():
        for batch in batches:
            unet(*batch)
    cosines = [
        float(one @ two / (one.norm() * two.norm()))
        for pair in seen
        for one, two in zip(*(it.double().flatten(1) for it in pair), strict=True)
    ]
    assert len(cosines) == 8
    assert found[name] == pytest.approx(sum(cosines) / 8, abs=1e-9)


def test_the_score_is_the_sum_over_the_branchs_own_weights(unet, magnitude):
    """Layer by layer and output by output, without the convolution of the shortcut."""
    name = "up_blocks.0.resnets.0"
    expected = 0.0
    for layer, saliency in magnitude.saliency.items():
        if layer.startswith(f"{name}.") and "shortcut" not in layer:
            expected += sum(abs(float(output.double().sum())) for output in saliency)
    assert score_branches(unet, magnitude, 0)[name] == pytest.approx(expected)
    assert next(order_branches("score", unet, magnitude, None, 0)) == min(
        (branch.name for branch in find_branches(unet)), key=score_branches(unet, magnitude, 0).get
    )


def test_random_scores_depend_on_the_seed_alone(unet, magnitude):
    """The criterion random has no saliencies: two runs of a seed agree, two seeds do not."""
    random = replace(magnitude, criterion="random", saliency={})
    one, same, other = (list(order_branches("score", unet, random, None, seed)) for seed in (0, 0, 1))
    assert one == same != other


@pytest.mark.parametrize("order", ["greedy", "similarity"])
def test_a_measured_order_repeats_and_leaves_the_model_alone(unet, batches, magnitude, order):
    """Two runs find the same order, and modules and hooks are as before."""
    before, output = [type(module) for module in unet.modules()], predict(unet)
    first, second = (list(islice(order_branches(order, unet, magnitude, batches, 0), 2)) for _ in range(2))
    assert first == second
    assert len(set(first)) == 2
    assert [type(module) for module in unet.modules()] == before
    assert torch.equal(predict(unet), output)
    assert not any(module._forward_hooks for module in unet.modules())


@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    drawn=st.fixed_dictionaries(
        {
            "layers_per_block": st.integers(1, 2),
            "attention_head_dim": st.sampled_from([None, 8]),
            "order": st.sampled_from(["score", "similarity"]),
            "share": st.sampled_from([0.3, 0.7, 0.99]),
            "ratio": st.sampled_from([0, 0.3]),
        }
    )
)
def test_any_model_shrinks_in_both_directions(make_unet, magnitude_of, scheduler, images, drawn):
    """The cut is the dense model sliced and bypassed, its plan fits the dense model, and its config builds it."""
    order, share, ratio = (drawn.pop(key) for key in ("order", "share", "ratio"))
    dense = make_unet(**drawn)
    params = depth(share, {"ratio": ratio}, order=order)
    noisy = CalibrationBatches(dense, scheduler, images, params.depth, 0, purpose="depth", key="prune.depth")
    plan = plan_depth(dense, magnitude_of(dense), params, 0, noisy)
    pruned = cut(dense, plan)

    check_plan(plan, dense)
    assert len(plan.removed) == int(share * most_removable(find_branches(dense)))
    zero = copy.deepcopy(dense)
    for branch in plan.removed:
        zero_branch(zero, branch.name)
    if not ratio:
        assert torch.allclose(predict(pruned), predict(zero), atol=1e-5)
    assert unet_config(pruned)["removed_branches"] == bypassed(pruned)
