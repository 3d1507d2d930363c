"""Targets are met within their tolerance, or refused with the possible range."""

import itertools
import random

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from stages.fetch.model import BUNDLED
from stages.models.complexity import count_macs, count_params
from stages.models.groups import Group, Member, find_groups
from stages.models.latency import measure_latencies_ms
from stages.models.pipeline import read_unet
from stages.models.plan import Plan
from stages.prune.budget import TOLERANCES, Solver, is_in_reach
from stages.prune.params import PruneParams, Target
from stages.prune.path import Step, allowed_widths, choose_groups, cuts_after, find_path, width_step
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.prune.width_cost import WidthCost
from stages.runtime.errors import InputError

CONDITIONAL = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}
COUNT = {"macs": count_macs, "params": count_params}


@pytest.fixture(scope="module")
def models():
    """The digits model, one with several heads and scale_shift, and a conditional one with GEGLU."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    torch.manual_seed(0)
    several = UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
        resnet_time_scale_shift="scale_shift",
    )
    return {
        "digits": read_unet(BUNDLED / "digits"),
        "several": several.eval(),
        "conditional": UNet2DConditionModel(**CONDITIONAL).eval(),
    }


def random_targets(count):
    """Models and prune params, drawn with seed 0."""
    draws = random.Random(0)
    for _ in range(count):
        yield (
            draws.choice(["digits", "several", "conditional"]),
            {
                "target": {draws.choice(["macs", "params"]): f"{draws.uniform(10, 100):.1f}%"},
                "ranking": draws.choice(["uniform", "global"]),
                "round_to": draws.choice([1, 8, 16, 32]),
                "floor": draws.choice([0, 0.1, 0.25]),
                "heads": draws.choice(["width", "whole"]),
            },
        )


@pytest.mark.parametrize(
    ("name", "chosen"),
    [pytest.param(*it, marks=[pytest.mark.e2e] * (place % 5 > 2)) for place, it in enumerate(random_targets(20))],
)
def test_a_target_is_met_or_refused_with_the_possible_range(models, magnitude_of, name, chosen):
    """The cost is counted on the cut model; only targets outside the range are refused."""
    unet, params = models[name], PruneParams(**chosen)
    groups = find_groups(unet)
    costs = WidthCost(unet, groups, heads=params.heads, latency_repeats=3)
    cost = getattr(costs, params.target.quantity)
    path = find_path(groups, [torch.arange(group.width).float() for group in groups], params)
    target_cost, smallest = params.target.resolve(cost([0] * len(groups))), cost(cuts_after(path, len(groups)))
    tolerance = TOLERANCES[params.target.quantity]

    if target_cost < smallest * (1 - tolerance):
        with pytest.raises(InputError, match=r"possible from [\d.]+ [KMG] .* to [\d.]+ [KMG] "):
            plan_pruning(unet, magnitude_of(unet), params)
    else:
        plan = plan_pruning(unet, magnitude_of(unet), params)
        counted = COUNT[plan.budget.quantity](cut(unet, plan))
        assert counted == plan.budget.found
        assert counted == pytest.approx(target_cost, rel=tolerance)


@pytest.mark.parametrize("name", ["digits", "several", "conditional"])
@pytest.mark.parametrize("round_to", [1, 8])
def test_the_formula_equals_the_count_of_the_cut_model(models, magnitude_of, name, round_to):
    """MACs, parameters and widths are exact."""
    unet = models[name]
    params = PruneParams(target={"ratio": 0.37}, round_to=round_to)
    plan = plan_pruning(unet, magnitude_of(unet), params)
    costs = WidthCost(unet, find_groups(unet), heads="width", latency_repeats=3)
    pruned, cuts = cut(unet, plan), [len(group.cut) for group in plan.groups]

    assert costs.macs(cuts) == count_macs(pruned)
    assert costs.params(cuts) == count_params(pruned)
    for layer, width in costs.widths(cuts).items():
        assert tuple(pruned.get_submodule(layer).weight.shape[:2]) == width


@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_cut_widths_are_multiples_of_round_to(models, magnitude_of, ranking):
    """Norm groups and heads of each cut group stay of equal size; the width of a head is a multiple, too."""
    unet = models["several"]
    params = PruneParams(target={"macs": "60%"}, ranking=ranking, round_to=4)
    groups = find_groups(unet)
    planned = plan_pruning(unet, magnitude_of(unet), params).groups
    several = [group for group in groups if group.attentions]
    assert several
    for group, cuts in zip(groups, planned, strict=True):
        width = group.width - len(cuts.cut)
        assert not cuts.cut or width % 4 == width % group.blocks == 0
        assert not group.attentions or width // group.blocks % 4 == 0


def test_every_group_keeps_its_floor(models, magnitude_of):
    """Also under global ranking."""
    unet, groups = models["digits"], find_groups(models["digits"])
    params = PruneParams(target={"params": "50%"}, ranking="global", floor=0.5)
    plan = plan_pruning(unet, magnitude_of(unet), params)

    assert all(len(planned.cut) <= group.width / 2 for group, planned in zip(groups, plan.groups, strict=True))


def test_relative_and_absolute_targets_are_equivalent(models, magnitude_of):
    """50% and half the number of MACs give the same cuts."""
    unet = models["digits"]
    plans = [
        plan_pruning(unet, magnitude_of(unet), PruneParams(target={"macs": amount}))
        for amount in ("50%", count_macs(unet) / 2)
    ]

    assert plans[0].groups == plans[1].groups


@pytest.mark.parametrize(
    ("target", "cost"),
    [({"macs": 1e3}, "1 K MACs"), ({"params": 1e9}, "1 G parameters"), ({"macs": "200%"}, ".* MACs")],
)
def test_a_target_out_of_reach_is_refused_with_the_possible_range(models, magnitude_of, target, cost):
    """The message has the target and both ends of the range, with units."""
    unet, amount = models["digits"], r"[\d.]+ [KM] (MACs|parameters)"
    with pytest.raises(
        InputError, match=rf"^prune\.target {cost} is out of reach: possible from {amount} to {amount}; "
    ):
        plan_pruning(unet, magnitude_of(unet), PruneParams(target=target))


@pytest.mark.parametrize(
    ("target_cost", "expected"), [(98, False), (99.5, True), (150, True), (201, True), (203, False)]
)
def test_the_range_of_targets_ends_a_tolerance_beyond_its_costs(target_cost, expected):
    """1 % below the smallest and above the whole cost (closed form)."""
    assert is_in_reach("macs", target_cost, 100, 200) == expected


@pytest.mark.parametrize(
    ("quantity", "met", "missed", "advice"),
    [
        ("channels", 90.8, 91, "lower prune.round_to"),
        ("macs", 90.8, 91, "lower prune.round_to"),
        ("params", 90.8, 91, "lower prune.round_to"),
        ("latency_ms", 94.5, 95, "raise prune.latency_repeats"),
    ],
)
def test_a_cost_within_the_tolerance_meets_the_target(quantity, met, missed, advice):
    """Of costs 100, 90 and 80: 1 % of the target, and 5 % of a latency (closed form)."""
    solver = Solver([Step(0, 1, 0.1), Step(0, 2, 0.2)], 1, quantity, lambda cuts: 100 - 10 * cuts[0])

    assert solver.solve(met, 80, 100) == (90, [1])
    with pytest.raises(InputError, match=f"the nearest possible are .*; {advice}"):
        solver.solve(missed, 80, 100)


@pytest.mark.parametrize(
    ("target", "expected"),
    [({"latency_ms": 0.5}, 0.5), ({"latency_ms": "50%"}, 5), ({"macs": 0.5}, 5), ({"params": 0.5}, 5)],
)
def test_a_number_below_1_is_a_share_but_for_a_latency(target, expected):
    """Of a dense model's cost of 10; half a millisecond can be meant, half an operation cannot."""
    assert Target(**target).resolve(10) == expected


def test_a_ratio_that_leaves_one_channel_below_the_floor_is_refused(unet, magnitude):
    """One channel less can be removed."""
    layer = {"include": ("time_embedding.linear_1",), "floor": 0.5}
    found = plan_pruning(unet, magnitude, PruneParams(target={"ratio": 0.5}, **layer)).groups

    assert [len(group.cut) for group in found if group.cut] == [32]
    with pytest.raises(InputError, match=r"ratio 0\.51 leaves 31 of 64 channels in .*linear_1, at least 32 must stay"):
        plan_pruning(unet, magnitude, PruneParams(target={"ratio": 0.51}, **layer))


def test_a_ratio_of_zero_leaves_the_heads_alone(models, magnitude_of):
    """The plan names no attention."""
    unet = models["several"]

    assert plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0}, heads="whole")).heads == {}


def test_whole_heads_leave_the_width_of_a_head(models, magnitude_of, tmp_path, scheduler):
    """There are fewer heads of the same width, in memory and after loading."""
    from stages.models.pipeline import write_pipeline

    unet = models["several"]
    plan = plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.5}, heads="whole"))
    pruned = cut(unet, plan)
    write_pipeline(tmp_path / "pruned", pruned, scheduler)
    name = next(iter(plan.heads))

    for model in (pruned, read_unet(tmp_path / "pruned")):
        attention = model.get_submodule(name)
        assert attention.heads == plan.heads[name] == 2
        assert attention.to_q.out_features // attention.heads == 16


def test_excluded_layers_keep_their_width(models, magnitude_of):
    """So does every layer that is coupled with them."""
    unet = models["digits"]
    params = PruneParams(target={"ratio": 0.5}, exclude=("mid_block.*", "conv_in"))
    plan, groups = plan_pruning(unet, magnitude_of(unet), params), find_groups(unet)
    uncut = {group.root for group in groups if any(p == "conv_in" or "mid_block" in p for p in group.producers())}

    assert uncut
    assert all(bool(group.cut) == (group.root not in uncut) for group in plan.groups)


def test_only_included_layers_are_cut(models, magnitude_of):
    """Every producer of a cut group matches the pattern."""
    unet = models["digits"]
    plan = plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.5}, include=("up_blocks.*",)))
    groups = {group.root: group for group in find_groups(unet)}

    cut_groups = [groups[group.root] for group in plan.groups if group.cut]
    assert cut_groups
    assert all(layer.startswith("up_blocks.") for group in cut_groups for layer in group.producers())


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"exclude": ("mid_blok.*",)}, r"prune.exclude 'mid_blok.\*' matches no layer"),
        ({"include": ("conv_in",), "exclude": ("conv_in",)}, "leave no group to cut"),
        ({"round_to": 64, "floor": 0.9}, "no group can be cut with"),
    ],
)
def test_patterns_that_leave_nothing_are_refused(unet, magnitude, chosen, message):
    """A misspelt pattern is an error, not ignored."""
    with pytest.raises(InputError, match=message):
        plan_pruning(unet, magnitude, PruneParams(target={"ratio": 0.3}, **chosen))


def test_a_ratio_that_rounds_to_nothing_is_refused(models, magnitude_of):
    """The message has the key to change."""
    with pytest.raises(InputError, match=r"ratio 0\.3 cuts nothing at prune\.round_to 64; lower round_to"):
        plan_pruning(models["digits"], magnitude_of(models["digits"]), PruneParams(target={"ratio": 0.3}, round_to=64))


def test_global_ranking_takes_the_lowest_scores_first():
    """The key of a step is the score of the channels that it removes: 0 and 6 are removed before 10."""
    groups = [Group("a", 2, 1, [Member("a", 0, torch.arange(2), torch.arange(2))]) for _ in range(2)]
    scores = [torch.tensor([0.0, 10.0]), torch.tensor([6.0, 6.0])]
    params = PruneParams(target={"ratio": 0.3}, ranking="global", floor=0.0)

    wide = [Group("a", 3, 1, groups[0].members) for _ in range(2)]
    path = find_path(wide, [torch.cat([each, torch.tensor([99.0])]) for each in scores], params)
    assert [(step.group, step.cut) for step in path] == [(0, 1), (1, 1), (1, 2), (0, 2)]


def test_patterns_do_not_apply_to_norms(models, magnitude_of):
    """Layers of down blocks are cut although their channels are also normalised in up blocks."""
    unet = models["digits"]
    plan = plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.3}, include=("down_blocks.*",)))
    groups = {group.root: group for group in find_groups(unet)}
    cut_groups = [groups[group.root] for group in plan.groups if group.cut]

    assert any(member.norm and member.layer.startswith("up_blocks.") for g in cut_groups for member in g.members)


@pytest.mark.parametrize("ranking", ["uniform", "global"])
def test_scores_decide_under_global_ranking(models, magnitude_of, ranking):
    """A group loses more if some of its scores are low beside their mean; under uniform ranking as much as before."""
    unet = models["digits"]
    importance, params = magnitude_of(unet), PruneParams(target={"macs": "80%"}, ranking=ranking)
    group = next(group for group in find_groups(unet) if group.root.startswith("mid_block") and group.blocks > 1)

    def count_cut():
        plan = plan_pruning(unet, importance, params)
        return next(len(planned.cut) for planned in plan.groups if planned.root == group.root)

    before = count_cut()
    for member in group.members:
        if member.layer in importance.saliency:
            low = member.channels[member.roots % 2 == 0]
            importance.saliency[member.layer].transpose(0, member.dim)[low] *= 1e-6

    assert (count_cut() > before) == (ranking == "global")
    assert count_cut() >= before > 0


def test_whole_heads_leave_multiples_of_round_to():
    """Four heads of 20 channels lose two at once at 8, so that 40 stay."""
    heads = Group("q", 80, 4, [Member("q", 0, torch.arange(80), torch.arange(80))], attentions=("attention",))

    assert width_step(heads, 8, "whole") == 40
    assert width_step(heads, 4, "whole") == 20
    assert width_step(heads, 8, "width") == 32


@pytest.mark.e2e
def test_a_latency_is_met_on_this_device(models, magnitude_of):
    """The measured latency is within 5 % of the target."""
    unet = models["several"]
    plan = plan_pruning(unet, magnitude_of(unet), PruneParams(target={"latency_ms": "90%"}, latency_repeats=60))

    assert plan.budget.quantity == "latency_ms"
    assert plan.budget.line().endswith(" ms (batch 1, float32, eager, kernels chosen for speed)")
    assert Plan.model_validate(plan.to_json()) == plan
    times_ms = measure_latencies_ms({"dense": unet, "pruned": cut(unet, plan)}, 60)
    assert plan.budget.found == pytest.approx(plan.budget.asked, rel=0.05)
    assert times_ms["pruned"] / times_ms["dense"] == pytest.approx(0.9, rel=0.15)  # measured anew, on a busy machine


def test_a_path_goes_through_every_allowed_width(models):
    """In each group from the dense width to the smallest, one width step at a time."""
    groups = find_groups(models["conditional"])
    params = PruneParams(target={"ratio": 0.3}, round_to=8)
    path = find_path(groups, [torch.rand(group.width) for group in groups], params)

    assert [step.key for step in path] == sorted(step.key for step in path)
    for index in choose_groups(groups, params.include, params.exclude):
        step_size = width_step(groups[index], params.round_to, params.heads)
        cuts = [step.cut for step in path if step.group == index]
        assert cuts == sorted(cuts)
        assert [groups[index].width - cut for cut in cuts] == allowed_widths(groups[index], step_size, params.floor)
        assert all(b - a == step_size for a, b in itertools.pairwise(cuts))
