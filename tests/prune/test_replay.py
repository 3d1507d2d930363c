"""Plans that are used again: on another checkpoint they work, on anything else they are refused in one line."""

import json

import pytest
import torch

from stages.models.plan import Plan, read_plan
from stages.prune.kept import check_plan
from stages.prune.params import PruneParams
from stages.prune.pruning import replay
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.runtime.errors import InputError
from stages.storage.files import write_json


@pytest.fixture
def plan(unet, magnitude):
    """A plan of the tiny UNet."""
    return plan_pruning(unet, magnitude, PruneParams(target={"ratio": 0.3}))


@pytest.fixture
def written(tmp_path, plan):
    """Its file, and a way to change it."""
    path = tmp_path / "pruning_plan.json"
    write_json(path, plan.to_json())

    def change(edit, *, seal=True):
        content = json.loads(path.read_text())
        edit(content)
        if seal:
            content["sha256"] = Plan.model_validate(content).content_sha256()
        path.write_text(json.dumps(content))
        return path

    return change


def test_a_plan_survives_its_file(written, plan):
    """What is written is what was decided, hash included."""
    assert read_plan(written(lambda _: None)) == plan


def test_another_checkpoint_of_the_same_base_loses_the_same_channels(make_unet, plan):
    """Its own weights, the old choice; the new plan names both."""
    other = make_unet(seed=1)
    again = replay(plan, other)
    pruned = cut(other, again)

    assert again.layers == plan.layers
    assert (again.replayed_from, again.sha256) == (plan.sha256, again.content_sha256())
    assert again.base.weights_sha256 != plan.base.weights_sha256
    kept = plan.layers["conv_in"].outputs
    assert torch.equal(pruned.conv_in.weight, other.conv_in.weight[kept])


def drop_a_layer(content):
    """One layer less."""
    content["layers"].pop("conv_out")


def swap_a_channel(content):
    """One kept channel replaced by one that was cut."""
    content["layers"]["conv_in"]["outputs"][0] = content["groups"][0]["cut"][0] + 100


def cut_one_more(content):
    """A group that loses one channel more than its layers say."""
    group = next(group for group in content["groups"] if group["cut"] and group["blocks"] == 1)
    group["cut"] = sorted({*group["cut"], *range(2)})


def cut_beyond_the_width(content):
    """A channel that does not exist."""
    content["groups"][0]["cut"] = [10_000]


def drop_a_group(content):
    """One group less."""
    content["groups"].pop()


def cut_unevenly(content):
    """Two channels of one norm group and none of the others, with layers that fit."""
    uneven = next(group for group in content["groups"] if group["blocks"] > 1 and group["cut"])
    uneven["cut"] = [0, 1]


def count_unknown_heads(content):
    """Heads of an attention that does not exist."""
    content["heads"] = {"nowhere": 2}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (drop_a_layer, "channels of conv_out are not those that its groups leave"),
        (swap_a_channel, "channels of conv_in are not those that its groups leave"),
        (cut_one_more, "are not those that its groups leave"),
        (cut_beyond_the_width, "cuts channels of .* that do not exist"),
        (cut_unevenly, "unevenly: its 4 norm groups or heads stay equal"),
        (count_unknown_heads, "counts the heads of nowhere"),
        (drop_a_group, "groups are not those of this model"),
        (
            lambda c: c["base"].update(family="UNet2DConditionModel"),
            "for a UNet2DConditionModel, this is a UNet2DModel",
        ),
        (lambda c: c["base"].update(architecture_sha256="0" * 64), "made for another architecture"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_plan_that_contradicts_itself_or_the_model_is_refused(written, unet, edit, words):
    """Even with a fitting hash."""
    with pytest.raises(InputError, match=words):
        check_plan(read_plan(written(edit)), unet)


@pytest.mark.parametrize("edit", [swap_a_channel, drop_a_layer, lambda c: c.update(criterion="random")])
def test_a_plan_that_was_tampered_with_is_refused(written, edit):
    """Any change after it was sealed, also of what nobody computes with."""
    with pytest.raises(InputError, match="was changed after it was written"):
        read_plan(written(edit, seal=False))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c.update(version=1), "has version 1; known: 2"),
        (lambda c: c.pop("groups"), "is no pruning plan: groups: Field required"),
        (lambda c: c.update(surprise=1), "is no pruning plan: surprise"),
        (lambda c: c["budget"].update(found="much"), "is no pruning plan: budget.found"),
    ],
)
def test_a_file_of_another_shape_is_refused(written, edit, words):
    """A version or a key that is not known, a key that lacks."""
    with pytest.raises(InputError, match=words):
        read_plan(written(edit, seal=False))


@pytest.mark.parametrize("changes", [{"layers_per_block": 2}, {"block_out_channels": (16, 48)}, {"norm_num_groups": 8}])
def test_a_plan_from_another_base_is_refused(make_unet, plan, changes):
    """More layers, other widths, or the same shapes with other GroupNorm groups."""
    with pytest.raises(InputError, match=r"another architecture|not those of this model"):
        check_plan(plan, make_unet(**changes))
