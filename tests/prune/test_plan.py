"""Choosing channels, cutting them, and the checks of importance and result."""

import itertools
from dataclasses import replace

import pytest
import torch

from stages.models.groups import Group, find_groups
from stages.models.latency import SETTING
from stages.models.plan import Plan
from stages.prune.params import PruneParams
from stages.prune.path import choose_channels
from stages.prune.pruning import check_importance
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut, verify
from stages.runtime.errors import InputError
from stages.storage.files import read_json, write_json


def at(ratio):
    """Params that cut this share from every group."""
    return PruneParams(target={"ratio": ratio})


X, T = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])


def test_cutting_nothing_changes_nothing(unet, magnitude):
    """At ratio 0 the output is bit-identical."""
    pruned = cut(unet, plan_pruning(unet, magnitude, at(0.0)))

    assert torch.equal(pruned(X, T).sample, unet(X, T).sample)


def test_only_a_latency_names_its_setting(unet, magnitude):
    """The plans of other targets keep the bytes and the hash that they had before."""
    plan = plan_pruning(unet, magnitude, at(0.3))
    latency = plan.budget.model_copy(update={"quantity": "latency_ms", "setting": SETTING})

    assert list(plan.to_json()["budget"]) == ["quantity", "asked", "found", "smallest", "dense"]
    assert latency.model_dump()["setting"] == SETTING
    assert Plan.model_validate(plan.model_copy(update={"budget": latency}).to_json()).budget == latency


def test_cutting_dead_channels_changes_nothing(unet, magnitude):
    """Cutting exactly the channels of the time embedding whose weights in the next layer are zero."""
    dead = [3, 17, 40]
    with torch.no_grad():
        unet.time_embedding.linear_2.weight[:, dead] = 0
    plan = plan_pruning(unet, magnitude, at(0.0))
    groups = [
        group.model_copy(update={"cut": dead}) if group.root == "time_embedding.linear_1" else group
        for group in plan.groups
    ]
    remaining = [channel for channel in range(64) if channel not in dead]
    layers = dict(plan.layers)
    layers["time_embedding.linear_1"] = layers["time_embedding.linear_1"].model_copy(update={"outputs": remaining})
    layers["time_embedding.linear_2"] = layers["time_embedding.linear_2"].model_copy(update={"inputs": remaining})
    pruned = cut(unet, plan.model_copy(update={"groups": groups, "layers": layers}))

    assert pruned.time_embedding.linear_1.out_features == 61
    torch.testing.assert_close(pruned(X, T).sample, unet(X, T).sample)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7])
def test_every_group_loses_the_ratio_rounded_to_its_blocks(unet, magnitude, ratio):
    """Norm groups stay of equal size."""
    for group in plan_pruning(unet, magnitude, at(ratio)).groups:
        num_cut = group.width - int(group.width * (1 - ratio))
        assert len(group.cut) == num_cut // group.blocks * group.blocks
        per_block = [
            sum(channel // (group.width // group.blocks) == block for channel in group.cut)
            for block in range(group.blocks)
        ]
        assert len(set(per_block)) == 1


def test_the_lowest_scores_of_each_block_are_cut():
    """Half of each of two blocks of four (closed form)."""
    scores = torch.tensor([4.0, 1.0, 3.0, 2.0, 50.0, 80.0, 70.0, 60.0])

    assert choose_channels(scores, Group("layer", 8, 2, []), 4, "width").tolist() == [1, 3, 4, 7]
    assert choose_channels(scores, Group("layer", 8, 1, []), 4, "width").tolist() == [0, 1, 2, 3]


def test_the_heads_with_the_lowest_sums_are_cut():
    """Whole, also where a head that stays has the lowest single score (closed form)."""
    heads = Group("layer", 8, 2, [], attentions=("attention",))
    scores = torch.tensor([4.0, 4.0, 4.0, 4.0, 0.0, 9.0, 9.0, 9.0])

    assert choose_channels(scores, heads, 4, "whole").tolist() == [0, 1, 2, 3]


def test_a_ratio_that_empties_a_group_is_refused(unet, magnitude):
    """The message has the ratio, the group and the key to change."""
    with pytest.raises(InputError, match=r"ratio 0\.99 leaves 0 of \d+ channels in .*; lower the ratio"):
        plan_pruning(unet, magnitude, at(0.99))


def test_importance_of_another_model_is_refused(make_unet, magnitude):
    """Even if only the weights differ."""
    with pytest.raises(InputError, match="the importance was measured on another model"):
        check_importance(magnitude, make_unet(seed=1))


@pytest.mark.parametrize(
    "damage",
    [
        dict.clear,
        lambda s: s.pop("conv_in"),
        lambda s: s["conv_in"].fill_(float("nan")),
        lambda s: s.update(conv_in=s["conv_in"].double()),
    ],
)
def test_damaged_importance_is_refused(unet, magnitude, damage):
    """It is empty, lacks a layer, is not finite or not float32."""
    damage(magnitude.saliency)

    with pytest.raises(InputError, match="do not cover the model's weights or are not finite"):
        check_importance(magnitude, unet)


def test_the_criterion_random_has_no_saliencies(unet, magnitude):
    """With those of another criterion it is refused."""
    check_importance(replace(magnitude, criterion="random", saliency={}), unet)

    with pytest.raises(InputError, match="do not cover the model's weights"):
        check_importance(replace(magnitude, criterion="random"), unet)


def test_random_depends_on_its_seed(unet, magnitude):
    """The same seed gives the same selection, another seed another one."""
    no_saliency = type(magnitude)(**{**vars(magnitude), "criterion": "random", "saliency": {}})
    plans = [plan_pruning(unet, no_saliency, at(0.3), seed) for seed in (0, 0, 1)]

    assert plans[0] == plans[1]
    assert plans[0].groups != plans[2].groups


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_head_dim": 8},
        {"layers_per_block": 2},
        {
            "block_out_channels": (16, 32, 32),
            "down_block_types": ("DownBlock2D",) * 3,
            "up_block_types": ("UpBlock2D",) * 3,
        },
        {"in_channels": 3, "out_channels": 3},
        {"resnet_time_scale_shift": "scale_shift"},
    ],
    ids=str,
)
def test_other_architectures_are_cut_and_run(make_unet, magnitude_of, changes):
    """Several heads, deeper blocks, more levels, three channels, scale_shift."""
    unet = make_unet(**changes)
    pruned = cut(unet, plan_pruning(unet, magnitude_of(unet), at(0.3)))

    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in unet.parameters())


def test_heads_keep_equal_widths(make_unet, magnitude_of):
    """The four heads of a 32-channel attention lose two of their eight channels each."""
    unet = make_unet(attention_head_dim=8)
    plan = plan_pruning(unet, magnitude_of(unet), at(0.3))
    groups = [group for group in plan.groups if group.root.endswith("to_v")]

    assert groups
    for group in groups:
        assert [sum(channel // 8 == head for channel in group.cut) for head in range(4)] == [2, 2, 2, 2]


def test_norm_groups_of_two_sizes_both_stay_equal(make_unet, magnitude_of):
    """Channels that norms of 4 and of 6 groups read are cut 12 at a time."""
    unet = make_unet(block_out_channels=(24, 48), norm_num_groups=4, attn_norm_num_groups=6)
    plan = plan_pruning(unet, magnitude_of(unet), at(0.3))
    groups = [group for group in plan.groups if group.blocks == 12]

    assert groups
    assert all(len(group.cut) == 12 for group in groups)
    assert cut(unet, plan)(X, T).sample.isfinite().all()


def test_a_plan_is_the_same_after_writing_and_reading(tmp_path, unet, magnitude):
    """As JSON."""
    plan = plan_pruning(unet, magnitude, at(0.3))
    write_json(tmp_path / "plan.json", plan.to_json())

    assert Plan.model_validate(read_json(tmp_path / "plan.json")) == plan


def test_a_result_that_differs_from_the_plan_is_an_error(unet, magnitude):
    """Two swapped channels are found."""
    plan = plan_pruning(unet, magnitude, at(0.3))
    pruned = cut(unet, plan)
    with torch.no_grad():
        pruned.conv_in.weight[[0, 1]] = pruned.conv_in.weight[[1, 0]]

    with pytest.raises(RuntimeError, match=r"conv_in\.weight .* differs from the plan"):
        verify(unet, pruned, plan)


def test_every_prunable_layer_belongs_to_groups(unet):
    """Inputs and outputs of each layer are in a group, except image channels and the sinusoidal embedding."""
    found = {(member.layer, member.dim) for group in find_groups(unet) for member in group.members}
    layers = [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    ungrouped = {("conv_in", 1), ("conv_out", 0), ("time_embedding.linear_1", 1)}

    assert set(itertools.product(layers, (0, 1))) - found == ungrouped
