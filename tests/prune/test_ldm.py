"""The formula ldm and the halves of GEGLU: the selection equals that of the original's LDM code (tests/oracle/ldm)."""

import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from stages.importance.measure import CalibrationBatch, measure_importance
from stages.models.complexity import count_macs, count_params
from stages.models.families import example_inputs
from stages.models.groups import Group, Member, build_graph
from stages.models.pipeline import read_unet, write_pipeline
from stages.models.plan import read_plan
from stages.prune.halves import choose_pairs
from stages.prune.params import PruneParams
from stages.prune.pruning import replay
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.runtime.errors import InputError
from stages.storage.files import write_json
from tests.numpy_weights import draw_weights

ORACLE = Path(__file__).parents[1] / "oracle" / "ldm"
EXCLUDE = {1: "up_blocks.1.resnets.1.conv2", 2: "up_blocks.3.resnets.2.conv2"}
"""Layers per block -> the layer whose group the original keeps whole, because its norm is that of the output."""


def halves(ratio=0.3, **changes):
    """The original's rules of selection."""
    return PruneParams(target={"ratio": ratio}, round_to=2, geglu="halves", **changes)


class Draws:
    """Images, noise and conditions of each timestep, drawn in order from numpy's generator as for the record."""

    def __init__(self, record):
        config = record["config"]
        self.size, self.width, self.batch = config["sample_size"], config["cross_attention_dim"], record["batch"]
        self.generator = np.random.RandomState(record["seed"] + 1)
        self.normal(1, 3, self.size, self.size), self.normal(1, 1, self.width)  # what the graph was traced with

    def normal(self, *shape):
        """Standard normal numbers, float32."""
        return torch.from_numpy(self.generator.standard_normal(shape)).float()

    def at(self, _timestep):
        """Another batch at every call."""
        images, noise = (self.normal(self.batch, 3, self.size, self.size) for _ in range(2))
        return CalibrationBatch(images, noise, {"encoder_hidden_states": self.normal(self.batch, 1, self.width)})


def rebuild(record):
    """Build the model of a record with weights of numpy's generator."""
    unet = UNet2DConditionModel.from_config(record["config"]).eval()
    draw_weights(unet, np.random.RandomState(record["seed"]))
    return unet


def plan_of(record, unet):
    """Measure and choose as the original does; return losses and plan."""
    importance = measure_importance(
        unet,
        DDPMScheduler(),
        [Draws(record)],
        record["timesteps"],
        criterion=record["criterion"],
        formula="ldm",
        threshold=record["threshold"],
    )
    exclude = (EXCLUDE[unet.config["layers_per_block"]],)
    return importance.losses[0], plan_pruning(unet, importance, halves(record["ratio"], exclude=exclude))


def outputs_cut(plan, group, unet):
    """List the removed outputs of a group's root, of a GEGLU both halves."""
    kept = plan.layers[group.root].outputs
    return sorted(set(range(len(unet.get_submodule(group.root).weight))) - set(kept))


@pytest.mark.parametrize("criterion", ["diff-pruning", "taylor"])
def test_the_selection_equals_the_original(criterion):
    """All groups in order, every channel, and every shape; the last block keeps its width (reference)."""
    record = json.loads((ORACLE / f"tiny.{criterion}.json").read_text())
    unet = rebuild(record)
    losses, plan = plan_of(record, unet)
    groups = [group for group in plan.groups if group.cut]

    np.testing.assert_allclose(losses, record["losses"][: len(losses)], rtol=1e-5)
    assert len(losses) == len(record["losses"]) - (criterion == "diff-pruning")  # the last one ended the sum
    assert [(group.root, outputs_cut(plan, group, unet)) for group in groups] == [
        (group["root"], group["pruned"]) for group in record["groups"]
    ]
    assert [group.root for group in plan.groups if not group.cut] == ["up_blocks.1.resnets.1.conv_shortcut"]
    pruned = cut(unet, plan)
    assert count_params(pruned) == record["params_after"]
    assert {name: list(tensor.shape) for name, tensor in pruned.state_dict().items()} == record["shapes_after"]


@pytest.mark.e2e
def test_the_selection_equals_the_original_at_full_size():
    """LDM-4 with random weights at one timestep: all 109 groups, every channel, the number of weights (reference)."""
    record = json.loads((ORACLE / "imagenet-ldm.diff-pruning.json").read_text())
    unet = rebuild(record)
    _, plan = plan_of(record, unet)
    groups = [(group.root, outputs_cut(plan, group, unet)) for group in plan.groups if group.cut]

    assert [(root, hashlib.sha256(json.dumps(found).encode()).hexdigest()) for root, found in groups] == [
        (group["root"], group["sha256"]) for group in record["groups"]
    ]
    assert count_params(cut(unet, plan)) == record["params_after"] == 193_730_473


@pytest.mark.e2e
@pytest.mark.parametrize("seed", range(3))
def test_ldm_4_has_the_size_of_the_paper(root, seed):
    """189.3 to 189.5 M parameters and 52.7 G MACs where values and gates rank independently; the paper has 189.43 M."""
    config = json.loads((root / "stages/fetch/systems/imagenet-ldm.json").read_text())
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(config).eval()
    random = measure_importance(unet, DDPMScheduler(), [], [], criterion="random", formula="ldm")
    pruned = cut(unet, plan_pruning(unet, random, halves(exclude=(EXCLUDE[2],)), seed))

    assert count_params(pruned) == pytest.approx(189.4e6, abs=0.15e6)
    assert count_macs(pruned) == pytest.approx(52.73e9, abs=0.06e9)


def graph_layers(graph, found):
    """Yield layer, dimension and indices of the convolutions, linear layers and norms of torch-pruning's group."""
    for item in found:
        layer = item.dep.target.module
        if isinstance(layer, nn.Conv2d | nn.Linear | nn.GroupNorm):
            is_norm = isinstance(layer, nn.GroupNorm)
            yield layer, int(not is_norm and graph.is_in_channel_pruning_fn(item.dep.handler)), item.idxs


def loop_over_groups(unet, ratio):
    """Cut `unet` in place by the original's rule, written as a loop over weights and gradients that shrink along."""
    graph, names = build_graph(unet), {module: name for name, module in unet.named_modules()}
    chosen = {}
    for found in graph.get_all_groups(ignored_layers=[unet.conv_out]):
        root, width = found[0].dep.target.module, len(found[0].idxs)
        scores, norm_groups, sides = [0.0] * width, 1, {}
        for layer, dim, indices in graph_layers(graph, found):
            sides.setdefault((layer, dim), []).extend(indices)
        for (layer, dim), indices in sides.items():
            if isinstance(layer, nn.GroupNorm):
                norm_groups = layer.num_groups
            if len(set(indices)) != width:
                continue  # read twice through a skip, or the layer behind a GEGLU
            saliency = (layer.weight * layer.weight.grad).abs().detach()
            rows = saliency.transpose(0, dim).flatten(1).sum(1) if saliency.ndim > 1 else saliency
            for place, index in enumerate(sorted(set(indices))):
                scores[place] += float(rows[index])
        if any(layer is unet.conv_norm_out for layer, _ in sides):
            continue  # the group of the output's norm stays
        num_cut = width - int(width * (1 - ratio))
        num_cut = (num_cut - num_cut % 2) // norm_groups
        first = sorted(range(width // norm_groups), key=lambda place: scores[place])[:num_cut]
        cut_now = {place + block * (width // norm_groups) for place in first for block in range(norm_groups)}
        if names[root].endswith("ff.net.0.proj"):
            cut_now |= {(place + width // 2) % width for place in cut_now}
        chosen[names[root]] = sorted(cut_now)
        pruner = graph.get_pruner_of_module(root).prune_out_channels
        graph.get_pruning_group(root, pruner, sorted(cut_now)).prune()  # of the gradients, too
    return chosen


@pytest.fixture
def one_head(conditional):
    """The small latent-diffusion UNet with one head in each attention, as LDM-4 has."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**conditional.config, "attention_head_dim": 1}).eval()
    draws = torch.Generator().manual_seed(1)
    for name, parameter in unet.named_parameters():
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.data = 1 + 0.3 * torch.randn(parameter.shape, generator=draws)
    return unet


def batches_of(unet, timesteps):
    """A batch for each timestep, each with its own images, noise and condition."""
    draws = torch.Generator().manual_seed(2)
    shapes = [tensor.shape for name, tensor in example_inputs(unet, 2).items() if name != "timestep"]
    made = {}
    for step in timesteps:
        images, condition = (torch.randn(shape, generator=draws) for shape in shapes)
        noise = torch.randn(images.shape, generator=draws)
        made[step] = CalibrationBatch(images, noise, {"encoder_hidden_states": condition})
    return made


class ByTimestep(dict):
    """Batches by timestep."""

    at = dict.__getitem__


@pytest.mark.parametrize("threshold", [0.0, 0.95])
def test_the_selection_equals_a_plain_loop(one_head, scheduler, threshold):
    """The loop measures, stops, scores the first norm group and cuts by itself (reference)."""
    steps, torch_model = range(0, 1000, 125), copy.deepcopy(one_head)
    batches = batches_of(one_head, steps)
    used, largest = [], 0.0
    for step in steps:
        batch, timesteps = batches[step], torch.full((2,), step)
        noisy = scheduler.add_noise(batch.images, batch.noise, timesteps)
        loss = (torch_model(noisy, timesteps, **batch.condition).sample - batch.noise).square().mean()
        largest = max(largest, loss.item())
        if loss.item() / largest < threshold:
            break
        loss.backward()
        used.append(loss.item())
    importance = measure_importance(
        one_head,
        scheduler,
        [ByTimestep(batches)],
        steps,
        criterion="diff-pruning",
        formula="ldm",
        threshold=threshold,
    )
    plan = plan_pruning(one_head, importance, halves(exclude=("up_blocks.1.resnets.1.conv2",)))
    chosen = {group.root: outputs_cut(plan, group, one_head) for group in plan.groups if group.cut}

    torch.testing.assert_close(importance.losses, [used])
    assert (len(used) < len(steps)) == (threshold > 0)
    assert chosen == loop_over_groups(torch_model, 0.3)


def test_all_norm_groups_lose_the_offsets_of_the_first(one_head, scheduler):
    """By the formula ldm; by the formula diffusers each norm group loses its own lowest channels."""
    batch = batches_of(one_head, [500])[500]
    alike = {}
    for formula in ("ldm", "diffusers"):
        found = measure_importance(one_head, scheduler, [batch], [500], criterion="taylor", formula=formula)
        groups = plan_pruning(one_head, found, PruneParams(target={"ratio": 0.3})).groups
        tables = [
            np.array(group.cut).reshape(group.blocks, -1) % (group.width // group.blocks)
            for group in groups
            if group.blocks > 1
        ]
        alike[formula] = [bool((table == table[0]).all()) for table in tables]

    assert all(alike["ldm"])
    assert not any(alike["diffusers"])


GATED = Group(
    "proj",
    4,
    1,
    [
        Member("proj", 0, torch.arange(8), torch.arange(8) % 4),
        Member("out", 1, torch.arange(4), torch.arange(4)),
    ],
)


@pytest.mark.parametrize(
    ("scores", "ratio", "expected"),
    [
        ([0, 1, 8, 9, 10, 11, 12, 13], 0.25, [0, 1]),  # two values
        ([0, 7, 8, 9, 1, 11, 12, 13], 0.25, [0]),  # a value and its gate
        ([0, 7, 8, 9, 10, 11, 1, 13], 0.25, [0, 2]),  # a value and another gate
        ([0, 1, 2, 9, 10, 11, 12, 13], 0.3, [0, 1]),  # three, rounded down to two
    ],
)
def test_a_pair_goes_if_its_value_or_its_gate_is_among_the_lowest(scores, ratio, expected):
    """Two of four values and four gates are chosen (closed form)."""
    assert GATED.gated
    assert choose_pairs(torch.tensor(scores, dtype=torch.float), GATED, halves(ratio)).tolist() == expected


def test_halves_cut_more_than_pairs_and_keep_values_with_their_gates(one_head, scheduler):
    """With independent scores about 1 − 0.7² of the pairs at ratio 0.3; the budget counts what is cut."""
    random = measure_importance(one_head, scheduler, [], [], criterion="random", formula="ldm")
    pairs, apart = (
        plan_pruning(one_head, random, PruneParams(target={"ratio": 0.3}, geglu=mode)) for mode in ("pairs", "halves")
    )
    gated = [group for group in apart.groups if group.root.endswith("ff.net.0.proj")]
    share = sum(len(group.cut) for group in gated) / sum(group.width for group in gated)
    others = [
        [(group.root, group.cut) for group in plan.groups if group not in gated and "ff.net.0" not in group.root]
        for plan in (pairs, apart)
    ]

    assert share == pytest.approx(1 - 0.7**2, abs=0.05)
    assert others[0] == others[1]
    assert apart.budget.found == sum(group.width - len(group.cut) for group in apart.groups) < pairs.budget.found
    for group in gated:
        kept = apart.layers[group.root].outputs
        middle = len(kept) // 2
        assert [channel + group.width for channel in kept[:middle]] == kept[middle:]


def test_a_plan_of_halves_is_saved_loaded_and_replayed(one_head, scheduler, tmp_path):
    """The loaded model is bit-identical, and the plan cuts the same channels from other weights."""
    found = measure_importance(one_head, scheduler, [], [], criterion="magnitude", formula="ldm")
    plan = plan_pruning(one_head, found, halves())
    pruned = cut(one_head, plan)
    write_pipeline(tmp_path / "pruned", pruned, scheduler)
    write_json(tmp_path / "plan.json", plan.to_json())
    inputs = example_inputs(one_head)
    other = copy.deepcopy(one_head)
    other.conv_in.weight.data += 1
    again = replay(read_plan(tmp_path / "plan.json"), other)

    assert torch.equal(read_unet(tmp_path / "pruned")(**inputs).sample, pruned(**inputs).sample)
    assert again.layers == plan.layers
    assert again.prune["geglu"] == "halves"
    assert cut(other, again).conv_in.weight.shape == pruned.conv_in.weight.shape


@pytest.mark.parametrize("changes", [{"target": {"macs": "60%"}}, {"target": {"ratio": 0.3}, "ranking": "global"}])
def test_halves_need_a_uniform_ratio(changes):
    """Other targets count pairs, of which the scores decide."""
    with pytest.raises(ValueError, match=r"geglu halves needs target\.ratio and ranking uniform"):
        PruneParams(geglu="halves", **changes)


def test_halves_of_a_model_without_geglu_are_refused(unet, magnitude):
    """In one line with the key and the value to set."""
    with pytest.raises(InputError, match=r"prune\.geglu is halves, and the model has no GEGLU that may be cut; set it"):
        plan_pruning(unet, magnitude, halves())


def test_halves_below_the_floor_are_refused(one_head, magnitude_of):
    """Also where no pair would be left."""
    with pytest.raises(InputError, match=r"ratio 0\.3 with geglu halves leaves \d+ of 128 pairs in .*least 77 must"):
        plan_pruning(one_head, magnitude_of(one_head), halves(floor=0.6))
    with pytest.raises(InputError, match="leaves 0 of 4 pairs in proj, at least 1 must stay"):
        choose_pairs(torch.arange(8.0), GATED, halves(0.99))


def test_whole_heads_need_a_formula_that_tells_them_apart(conditional, scheduler):
    """The formula ldm scores the first head alone."""
    found = measure_importance(conditional, scheduler, [], [], criterion="magnitude", formula="ldm")
    with pytest.raises(InputError, match=r"importance\.formula ldm scores all heads alike; set prune\.heads to width"):
        plan_pruning(conditional, found, PruneParams(target={"ratio": 0.5}, heads="whole"))
