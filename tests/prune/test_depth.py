"""Removal of residual branches: their shortcuts stay, and what goes is chosen by a measured order."""

import copy
import re
from dataclasses import replace
from itertools import count, islice

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.data.images import Conditions, label_table, write_images
from stages.finetune.distillation import kept_channels
from stages.models import latency
from stages.models.branches import find_branches, most_removable, record_removal, removable
from stages.models.complexity import count_macs, count_params
from stages.models.composition import compose
from stages.models.families import example_inputs, forward
from stages.models.latency import SETTING
from stages.models.layout import PLAN
from stages.models.params import RoundsParams
from stages.models.pipeline import read_unet, unet_config, write_pipeline
from stages.models.plan import Plan, read_plan
from stages.models.saliency import write_importance
from stages.models.shortcuts import bypassed, without_branches
from stages.models.stock import to_stock
from stages.prune.__main__ import main as prune
from stages.prune.branch_order import measure_similarity, order_branches, order_greedily, score_branches
from stages.prune.calibration import CalibrationBatches
from stages.prune.compensate import NoisyBatches, difference
from stages.prune.depth import Prefixes, candidate_numbers, count_removed, plan_depth
from stages.prune.depth_cost import DepthCost
from stages.prune.earlier import read_earlier
from stages.prune.kept import check_plan
from stages.prune.params import CompensateParams, DepthParams, PruneParams
from stages.prune.pruning import prune_unet, replay
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.runtime.errors import InputError
from stages.runtime.seeds import derive_seed
from stages.storage.files import write_json

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


def test_a_resnet_that_changes_the_resolution_is_no_branch(make_unet):
    """Its shortcut alone would leave the next block with another size."""
    unet = make_unet(
        downsample_type="resnet",
        upsample_type="resnet",
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
    )
    assert unet.down_blocks[0].downsamplers[0].down
    assert not any("samplers" in branch.name for branch in find_branches(unet))


def test_what_a_removal_saves_is_the_difference_of_the_counts(unet, conditional):
    """Of MACs and parameters, for each branch, and their sum for several."""
    for dense in (unet, conditional):
        names = [branch.name for branch in find_branches(dense)][::2]
        records = record_removal(dense, names)
        shallow = without_branches(dense, names)
        assert sum(record.macs for record in records) == count_macs(dense) - count_macs(shallow)
        assert sum(record.params for record in records) == count_params(dense) - count_params(shallow)


def test_one_reader_of_timestep_and_condition_stays(unet, conditional, make_dit):
    """However many go, one resnet stays, and in a conditional model also one transformer; of DiT the first block."""
    dit = make_dit(num_layers=3)
    assert most_removable(find_branches(dit)) == len(find_branches(dit)) == 2
    shallow = without_branches(dit, [branch.name for branch in find_branches(dit)])
    assert forward(shallow, example_inputs(dit, 2)).isfinite().all()
    assert most_removable(find_branches(unet)) == len(find_branches(unet)) - 1
    assert most_removable(find_branches(conditional)) == len(find_branches(conditional)) - 2
    resnets = [branch.name for branch in find_branches(unet) if branch.kind == "resnet"]
    assert resnets[-1] not in [branch.name for branch in removable(find_branches(unet), resnets[:-1])]


def test_greedy_is_a_plain_loop_over_the_change_of_the_prediction(make_unet, batches):
    """Every branch is tried by zeroing its last layer in a copy; the one that changes least goes, then all anew.

    The change is a sum of squares: with these weights, that of magnitudes would choose another branch first.
    """
    unet = make_unet(seed=37)
    found, removed, magnitudes = [branch.name for branch in find_branches(unet)], [], {}
    order = order_greedily(unet, batches)
    for _ in range(2):
        changes = {}
        for name in found:
            if name not in removed:
                without = copy.deepcopy(unet)
                for gone in (*removed, name):
                    zero_branch(without, gone)
                with torch.no_grad():
                    pairs = [(unet(*batch).sample, without(*batch).sample) for batch in batches]
                changes[name] = sum(float((one - two).square().sum()) for one, two in pairs)
                magnitudes.setdefault(name, sum(float((one - two).abs().sum()) for one, two in pairs))
        removed.append(min(changes, key=changes.get))
        assert next(order) == removed[-1]
    assert removed[0] != min(magnitudes, key=magnitudes.get)


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
    """Layer by layer and output by output, whatever its sign, without the convolution of the shortcut."""
    draws = torch.Generator().manual_seed(0)
    signed = {name: torch.randn(saliency.shape, generator=draws) for name, saliency in magnitude.saliency.items()}
    magnitude = replace(magnitude, saliency=signed)
    name = "up_blocks.0.resnets.0"
    expected = 0.0
    for layer, saliency in signed.items():
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


@pytest.mark.e2e
@settings(
    max_examples=12,
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


def test_a_shallower_dit_is_the_model_without_the_block(make_dit, magnitude_of, scheduler, tmp_path):
    """Block by block as written here; the first stays, and the result is the same after save and load."""
    dense = make_dit(num_layers=3)
    names = [branch.name for branch in find_branches(dense)]
    assert names == ["transformer_blocks.1", "transformer_blocks.2"]
    plan = plan_depth(dense, magnitude_of(dense), depth([names[0]], {"ratio": 0.5}), 0, None)
    pruned = cut(dense, plan)
    alone, inputs = without_branches(dense, names[:1]), example_inputs(dense, 2)
    del dense.transformer_blocks[1]

    with torch.no_grad():
        assert torch.equal(forward(alone, inputs), forward(dense, inputs))
    write_pipeline(tmp_path / "pruned", pruned, scheduler)
    loaded = read_unet(tmp_path / "pruned")
    with torch.no_grad():
        assert torch.equal(forward(loaded, inputs), forward(pruned, inputs))
    assert not any(name.startswith("transformer_blocks.1.") for name in loaded.state_dict())
    assert not any(name.startswith("transformer_blocks.1") for name in kept_channels(make_dit(num_layers=3), plan))


def test_a_shallower_model_is_the_same_after_save_and_load(unet, magnitude, scheduler, tmp_path):
    """Here and in plain diffusers, bit for bit, without weights of what is gone."""
    plan = plan_depth(unet, magnitude, depth(MIDDLE, {"ratio": 0.3}), 0, None)
    pruned = cut(unet, plan)
    write_pipeline(tmp_path / "pruned", pruned, scheduler)
    plain = AutoModel.from_pretrained(str(tmp_path / "pruned" / "unet"), trust_remote_code=True)
    for loaded in (read_unet(tmp_path / "pruned"), plain):
        assert loaded.state_dict().keys() == pruned.state_dict().keys()
        assert torch.equal(predict(loaded), predict(pruned))
        assert loaded.config["removed_branches"] == bypassed(pruned)
    assert not any(name.startswith("mid_block.resnets.0") for name in pruned.state_dict())


def test_the_plan_has_version_3_only_with_removed_branches(unet, magnitude, tmp_path):
    """It is read back, and neither version passes for the other; without depth a plan has no key of it."""
    plan = plan_depth(unet, magnitude, depth(MIDDLE, {"ratio": 0.3}), 0, None)
    plain = plan_pruning(unet, magnitude, PruneParams(target={"ratio": 0.3}))
    write_json(tmp_path / "plan.json", plan.to_json())
    assert read_plan(tmp_path / "plan.json") == plan
    assert (plan.version, plain.version) == (3, 2)
    assert "removed" not in plain.to_json()
    assert "depth" not in plain.to_json()["prune"]
    for wrong in ({**plan.to_json(), "version": 2}, {**plain.to_json(), "version": 3}):
        write_json(tmp_path / "plan.json", wrong)
        with pytest.raises(InputError, match="version 3 lists removed branches"):
            read_plan(tmp_path / "plan.json")


def test_a_plan_with_branches_is_replayed_and_checked(unet, make_unet, magnitude):
    """The same branches and channels go from another checkpoint; names and sizes that do not fit are refused."""
    plan, other = plan_depth(unet, magnitude, depth(MIDDLE, {"ratio": 0.3}), 0, None), make_unet(seed=1)
    again = replay(plan, other)
    assert again.removed == plan.removed
    assert bypassed(cut(other, again)) == sorted(MIDDLE)
    for changes, found in (
        ({"name": "mid_block.resnets.7"}, "mid_block.resnets.7 is not in the model"),
        ({"macs": 1}, "other kinds or sizes"),
    ):
        removed = [plan.removed[0].model_copy(update=changes), *plan.removed[1:]]
        with pytest.raises(InputError, match=found):
            check_plan(plan.model_copy(update={"removed": removed}), unet)


def test_a_further_cut_keeps_the_removed_branches(unet, magnitude, magnitude_of, scheduler, tmp_path):
    """Their plans compose to one of the dense model; branches can go in the first cut alone."""
    first = plan_depth(unet, magnitude, depth(MIDDLE, {"ratio": 0.2}), 0, None)
    once = cut(unet, first)
    write_pipeline(tmp_path / "once", once, scheduler)
    write_json(tmp_path / "once" / PLAN, first.to_json())
    assert read_earlier(tmp_path / "once", once) == first
    second = plan_pruning(once, magnitude_of(once), PruneParams(target={"macs": "50%"}), earlier=first)
    total = compose(first, second)
    check_plan(total, unet)
    twice, again = cut(once, second).state_dict(), cut(unet, total).state_dict()
    assert twice.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in twice.items())
    assert second.budget.dense == count_macs(unet)
    with pytest.raises(InputError, match="only the first cut"):
        compose(first, first)


def test_a_plan_of_other_branches_than_the_models_is_refused(unet, magnitude, scheduler, tmp_path):
    """Beside the dense model, which has lost none."""
    write_pipeline(tmp_path / "dense", unet, scheduler)
    write_json(tmp_path / "dense" / PLAN, plan_depth(unet, magnitude, depth(MIDDLE), 0, None).to_json())
    with pytest.raises(InputError, match="0 residual branches are removed, 2 by the plan"):
        read_earlier(tmp_path / "dense", unet)


@pytest.mark.parametrize(("quantity", "count_cost"), [("macs", count_macs), ("params", count_params)])
def test_the_dearest_branch_saves_most_of_what_the_target_counts(unet, quantity, count_cost):
    """The model without it has the lowest count."""
    found = DepthCost(unet, PruneParams(target={quantity: "50%"})).dearest()
    costs = {branch.name: count_cost(without_branches(unet, [branch.name])) for branch in find_branches(unet)}
    assert costs[found[0]] == min(costs.values())


def test_the_target_is_met_by_depth_alone(unet, magnitude):
    """As few branches as it takes go, in order, no channel is cut, and another target is refused with the range."""
    plan = plan_depth(unet, magnitude, depth("target", {"params": "80%"}, order="score"), 0, None)
    names = [branch.name for branch in plan.removed]
    assert plan.budget.found == count_params(cut(unet, plan)) <= 0.808 * count_params(unet)
    assert count_params(without_branches(unet, names[:-1])) > 0.808 * count_params(unet)
    assert names == list(islice(order_branches("score", unet, magnitude, None, 0), len(names)))
    assert not any(group.cut for group in plan.groups)
    with pytest.raises(InputError, match=r"out of reach by depth alone: possible from .* MACs to 4.0772 M MACs"):
        plan_depth(unet, magnitude, depth("target", {"macs": "1%"}, order="score"), 0, None)


def test_the_search_tries_from_none_to_the_most_above_the_target(unet, magnitude):
    """With one more branch gone, the cost would be below the target."""
    order = Prefixes(order_branches("score", unet, magnitude, None, 0))
    cost = DepthCost(unet, PruneParams(target={"params": "80%"}))
    numbers = candidate_numbers(cost, order, 2)
    most = numbers[-1]

    assert numbers[0] == 0
    assert cost.without(order.first(most)) >= cost.target > cost.without(order.first(most + 1))


@pytest.mark.e2e
def test_the_search_finds_the_mix_that_changes_the_prediction_least(unet, magnitude, batches, capsys):
    """Every candidate meets the target, and the chosen one is the best of those tried."""
    params = depth("search", {"macs": "60%"}, order="score", candidates=3)
    plan = plan_depth(unet, magnitude, params, 0, batches)
    tried = [line.split() for line in capsys.readouterr().out.splitlines()]
    changes = {int(line[1]): float(line[-1]) for line in tried}
    assert len(changes) == 3
    assert plan.budget.found == pytest.approx(0.6 * count_macs(unet), rel=0.01)
    assert len(plan.removed) == min(changes, key=changes.get)
    assert difference(unet, cut(unet, plan), batches) == pytest.approx(min(changes.values()), rel=1e-3)
    with pytest.raises(InputError, match="out of reach by depth and width: possible from"):
        plan_depth(unet, magnitude, depth("search", {"macs": "0.1%"}, order="score"), 0, batches)


def test_a_share_below_the_target_is_met_by_width(unet, magnitude):
    """The share of the dense model's cost counts what the branches have saved."""
    plan = plan_depth(unet, magnitude, depth(3, {"macs": "56%"}, order="score"), 0, None)
    assert len(plan.removed) == 3
    assert count_macs(cut(unet, plan)) == pytest.approx(0.56 * count_macs(unet), rel=0.01)
    assert plan.budget.dense == count_macs(unet)


@pytest.fixture
def slowing(monkeypatch):
    """A machine that takes a pass's MACs for it in nanoseconds, and 4 % longer with each measurement."""
    slowness = (1.04**index for index in count())

    def time_in_turns(models, *_arguments, **_options):
        slower = next(slowness)
        return {name: [slower * count_macs(unet) * 1e-6] for name, unet in models.items()}

    monkeypatch.setattr(latency, "forward_pass", lambda unet: unet)
    monkeypatch.setattr(latency, "time_in_turns", time_in_turns)


@pytest.mark.usefixtures("slowing")
@pytest.mark.parametrize(("family", "remove"), [("dit", 1), ("dit", "target"), ("dit", "search"), ("unet", "target")])
def test_a_latency_is_met_with_depth_on_a_machine_that_slows_down(
    make_unet, make_dit, magnitude_of, scheduler, images, family, remove
):
    """It is a share of the dense model's at one speed, whatever is measured after it: by width, depth and both."""
    dense = make_unet() if family == "unet" else make_dit(num_layers=4)
    if family == "dit":
        rows = np.arange(24) % 3
        images = replace(images, conditions=Conditions(label_table(2, 2), rows, rows))
    params = depth(remove, {"latency_ms": "70%"}, order="score", candidates=3)
    noisy = CalibrationBatches(dense, scheduler, images, params.depth, 0, purpose="depth", key="prune.depth")
    plan = plan_depth(dense, magnitude_of(dense), params, 0, noisy)
    share = count_macs(cut(dense, plan)) / count_macs(dense)
    without_last = without_branches(dense, [branch.name for branch in plan.removed][:-1])

    assert plan.budget.asked == pytest.approx(0.7 * plan.budget.dense)
    assert plan.budget.found / plan.budget.dense == pytest.approx(share)
    assert share <= 0.7 * 1.05
    assert count_macs(without_last) > 0.7 * count_macs(dense)
    if remove == "target":
        assert not any(group.cut for group in plan.groups)
    else:
        assert share >= 0.7 * 0.95
    assert plan.budget.line().endswith(f" ms ({SETTING})")
    assert Plan.model_validate(plan.to_json()) == plan


@pytest.mark.usefixtures("slowing")
@pytest.mark.parametrize("remove", ["target", "search"])
def test_a_latency_out_of_reach_is_refused_with_the_range_at_one_speed(unet, magnitude, batches, remove):
    """By depth alone and with width, for a machine that slows down meanwhile."""
    params = depth(remove, {"latency_ms": "0.1%"}, order="score")
    range_ms = rf"possible from .* to {count_macs(unet) * 1e-6:.5g} ms; change"
    with pytest.raises(InputError, match=f"out of reach by depth .*{range_ms}"):
        plan_depth(unet, magnitude, params, 0, batches)


@pytest.mark.usefixtures("slowing")
def test_a_latency_of_a_further_cut_is_a_share_of_the_dense_models_at_one_speed(unet, magnitude_of):
    """Of a model that was pruned before, too."""
    first = plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.2}))
    once = cut(unet, first)
    plan = plan_pruning(once, magnitude_of(once), PruneParams(target={"latency_ms": "50%"}), earlier=first)

    assert count_macs(cut(once, plan)) / count_macs(unet) == pytest.approx(0.5, rel=0.05)


@pytest.mark.usefixtures("slowing")
def test_a_search_without_a_plan_names_what_can_be_done(unet, magnitude, batches):
    """Where a cut in width that takes no channel away cannot meet a target that depth alone passes."""
    params = depth("search", {"latency_ms": "70%"}, order="score").model_copy(update={"floor": 1})
    with pytest.raises(InputError, match="or set remove to target for depth alone"):
        plan_depth(unet, magnitude, params, 0, batches)


@pytest.mark.e2e
def test_a_latency_is_met_with_depth_on_this_device(make_dit, magnitude_of):
    """Measured anew in turns, a DiT that lost blocks takes the share of time that the plan says."""
    dense = make_dit(num_layers=6)
    params = depth("target", {"latency_ms": "60%"}, order="score").model_copy(update={"latency_repeats": 60})
    plan = plan_depth(dense, magnitude_of(dense), params, 0, None)
    times_ms = latency.measure_latencies_ms({"dense": dense, "pruned": cut(dense, plan)}, 60)

    assert plan.budget.found <= plan.budget.asked * 1.05
    assert times_ms["pruned"] / times_ms["dense"] == pytest.approx(plan.budget.found / plan.budget.dense, rel=0.15)


def test_patterns_may_name_layers_of_branches_that_go(unet, magnitude):
    """They choose channels to cut: what a removed branch takes along is no mistake, what no layer has is one."""
    params = depth(MIDDLE, {"ratio": 0.3}).model_copy(update={"exclude": ("mid_block.attentions.*",)})
    plan = plan_depth(unet, magnitude, params, 0, None)
    assert plan.groups == plan_depth(unet, magnitude, depth(MIDDLE, {"ratio": 0.3}), 0, None).groups
    assert plan.prune["exclude"] == ["mid_block.attentions.*"]
    with pytest.raises(InputError, match=r"prune\.exclude 'nowhere' matches no layer"):
        plan_depth(unet, magnitude, params.model_copy(update={"exclude": ("nowhere",)}), 0, None)


def test_a_search_where_only_removable_branches_may_be_cut(make_dit, magnitude_of, scheduler, images):
    """The smallest model has none of them; with them a cut in width alone reaches the target."""
    dit, rows = make_dit(num_layers=3), np.arange(24) % 3
    images = replace(images, conditions=Conditions(label_table(2, 2), rows, rows))
    params = depth("search", {"macs": "90%"}).model_copy(update={"include": ("transformer_blocks.1.*",)})
    noisy = CalibrationBatches(dit, scheduler, images, params.depth, 0, purpose="depth", key="prune.depth")
    plan = plan_depth(dit, magnitude_of(dit), params, 0, noisy)
    assert plan.budget.found == pytest.approx(plan.budget.asked, rel=0.01)
    with pytest.raises(InputError, match=r"^prune\.depth\.remove takes every layer along that prune\.include"):
        plan_depth(
            dit,
            magnitude_of(dit),
            params.model_copy(update={"depth": DepthParams(remove=["transformer_blocks.1"])}),
            0,
            None,
        )


def test_patterns_that_leave_nothing_to_cut_are_no_fault_of_the_removal(unet, magnitude):
    """Whatever goes, they name nothing."""
    params = depth(MIDDLE, {"ratio": 0.3}).model_copy(update={"exclude": ("*",)})
    with pytest.raises(InputError, match=r"^prune\.include and prune\.exclude leave no group to cut"):
        plan_depth(unet, magnitude, params, 0, None)


def test_a_plan_without_cut_channels_is_replayed_twice(make_unet, magnitude):
    """With compensation, which it has no use for."""
    unet = make_unet()
    plan = plan_depth(unet, magnitude, depth("target", {"macs": "90%"}, order="score"), 0, None)
    once = replay(plan, make_unet(seed=1), CompensateParams())
    twice = replay(once, make_unet(seed=2))
    assert once.prune["compensate"] is None
    assert [branch.name for branch in twice.removed] == [branch.name for branch in plan.removed]


def test_without_a_cut_channel_there_is_nothing_to_compensate(unet, magnitude, scheduler, images, capsys):
    """Of a plan that only removes branches, whose layers are whole."""
    params = PruneParams(
        target={"ratio": 0}, depth={"remove": MIDDLE}, compensate={"num_images": 4, "num_timesteps": 2}
    )
    plan = plan_depth(unet, magnitude, params, 0, None)
    prune_unet(unet, plan, NoisyBatches(unet, scheduler, images, params.compensate, 0))
    printed = capsys.readouterr()
    assert "nothing to compensate: no channel is cut" in printed.out
    assert not printed.err


def test_more_timesteps_than_the_model_has_are_refused(unet, scheduler, images):
    """They would repeat; as many as it has are all of them."""
    params = CompensateParams(num_images=4, num_timesteps=1000)
    assert NoisyBatches(unet, scheduler, images, params, 0).timesteps == list(range(1000))
    params = CompensateParams(num_images=4, num_timesteps=1001)
    with pytest.raises(InputError, match=r"prune\.compensate\.num_timesteps 1001 is more than the model's 1000"):
        NoisyBatches(unet, scheduler, images, params, 0)


def test_compensation_reads_the_layers_that_are_left(unet, magnitude, scheduler, images, capsys):
    """It corrects the narrower layers of a shallower model towards the dense outputs."""
    quick = {"num_images": 8, "num_timesteps": 2}
    params = PruneParams(target={"ratio": 0.3}, depth={"remove": MIDDLE}, compensate=quick)
    plan = plan_depth(unet, magnitude, params, 0, None)
    pruned = prune_unet(unet, plan, NoisyBatches(unet, scheduler, images, params.compensate, 0))
    assert bypassed(pruned) == sorted(MIDDLE)
    before, after = re.search(r"prediction (\S+) -> (\S+) on held-out", capsys.readouterr().out).groups()
    assert float(after) < float(before)


def test_a_shallower_model_has_no_stock_config(unet, magnitude):
    """The message names what is gone."""
    pruned = cut(unet, plan_depth(unet, magnitude, depth(MIDDLE, {"ratio": 0.25}), 0, None))
    with pytest.raises(InputError, match=r"no stock config has mid_block.attentions.0 and 1 other modules"):
        to_stock(pruned, 1000)


def test_features_of_removed_blocks_are_not_distilled(unet, magnitude):
    """Only blocks that the student has are compared with the teacher's."""
    plan = plan_depth(unet, magnitude, depth(MIDDLE, {"ratio": 0.3}), 0, None)
    channels = kept_channels(unet, plan)
    assert "mid_block.resnets.0" not in channels
    assert channels["mid_block.resnets.1"] == plan.layers["mid_block.resnets.1.conv2"].outputs


@pytest.mark.parametrize(
    ("remove", "found"),
    [
        (["mid_block.resnets.9"], "mid_block.resnets.9 is not in the model; a branch that can go is mid_block.resnets"),
        (["conv_in"], "conv_in is no residual branch whose shortcut can stay alone"),
        (["mid_block.attentions.0", "mid_block.attentions.0"], "removed twice"),
        (99, r"remove 99 is more than the \d+ branches that can go"),
        (0.01, "less than one of the"),
    ],
)
def test_branches_that_cannot_go_are_refused(unet, magnitude, remove, found):
    """In one line that says what can go."""
    with pytest.raises(InputError, match=found):
        plan_depth(unet, magnitude, depth(remove, order="score"), 0, None)


@pytest.mark.parametrize(("remove", "most", "expected"), [("29%", 100, 29), (5, 5, 5)])
def test_the_number_of_branches_is_exact(remove, most, expected):
    """0.29 · 100 is 29, though it is below that in binary fractions; all that can go may be asked for."""
    assert count_removed(DepthParams(remove=remove), most) == expected


def test_not_all_branches_can_go(unet, magnitude):
    """The last reader of the timestep is named."""
    names = [branch.name for branch in find_branches(unet)]
    with pytest.raises(InputError, match=f"would read the timestep; at most {len(names) - 1} of {len(names)} can go"):
        plan_depth(unet, magnitude, depth(sorted(names, key=lambda name: "resnets" in name)), 0, None)


@pytest.mark.parametrize(
    ("block", "found"),
    [
        ({"depth": {"remove": 1, "order": "best"}}, "greedy"),
        ({"depth": {"remove": 0}}, "give a number of branches"),
        ({"depth": {"remove": "100%"}}, "give a number of branches"),
        ({"depth": {"remove": []}}, "give a number of branches"),
        ({"depth": {"remove": "target"}}, "needs target.macs, params or latency_ms"),
        (
            {"target": {"macs": "50%"}, "depth": {"remove": "target"}, "compensate": CALIBRATION},
            "nothing to compensate",
        ),
    ],
)
def test_a_block_that_makes_no_sense_is_refused(block, found):
    """Before anything is read."""
    with pytest.raises(ValidationError, match=found):
        PruneParams.model_validate({"target": {"ratio": 0.3}, **block})


def test_depth_is_not_divided_into_rounds():
    """Only the first cut of a model can remove branches."""
    with pytest.raises(InputError, match="cannot be divided into rounds"):
        depth(1).check_rounds(RoundsParams(count=2))


def test_the_stage_prunes_in_depth_and_repeats(tmp_path, unet, magnitude, scheduler, images):
    """Greedily on packed images, to the plan of another run; without images it is refused and writes none."""
    write_pipeline(tmp_path / "model", unet, scheduler)
    (tmp_path / "importance").mkdir()
    write_importance(tmp_path / "importance", magnitude)
    (tmp_path / "data").mkdir()
    write_images(tmp_path / "data", images, {})
    block = "prune:\n  target: {ratio: 0.3}\n  depth: {remove: 1, num_images: 2, num_timesteps: 1}\n"
    (tmp_path / "params.yaml").write_text(f"seed: 0\n{block}")
    common = ("--params", tmp_path / "params.yaml", "--importance", tmp_path / "importance")

    def run(model, out, *more):
        options = [str(each) for each in (*common, "--model", tmp_path / model, "--out", tmp_path / out, *more)]
        return CliRunner().invoke(prune, options)

    result = run("model", "first", "--data", tmp_path / "data")
    assert result.exit_code == 0, result.output
    params = PruneParams(target={"ratio": 0.3}, depth={"remove": 1, "num_images": 2, "num_timesteps": 1})
    again = CalibrationBatches(unet, scheduler, images, params.depth, 0, purpose="depth", key="prune.depth")
    plan = plan_depth(unet, magnitude, params, derive_seed(0, "random importance"), again)
    assert read_plan(tmp_path / "first" / PLAN) == plan
    written, pruned = read_unet(tmp_path / "first").state_dict(), cut(unet, plan).state_dict()
    assert all(torch.equal(tensor, pruned[name]) for name, tensor in written.items())
    result = run("model", "third")
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert "prune.depth needs calibration images" in result.output
    assert not (tmp_path / "third").exists()
