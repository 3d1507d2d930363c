"""Plans replayed on another checkpoint, and plans that are refused."""

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
    """A plan for the tiny UNet."""
    return plan_pruning(unet, magnitude, PruneParams(target={"ratio": 0.3}))


@pytest.fixture
def written(tmp_path, plan):
    """Write the plan, edit its file and return the path."""
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


def test_a_plan_is_the_same_after_writing_and_reading(written, plan):
    """Including its hash."""
    assert read_plan(written(lambda _: None)) == plan


def test_another_checkpoint_of_the_same_base_loses_the_same_channels(make_unet, plan):
    """The weights are its own; the new plan has the hashes of the weights and of the old plan."""
    other = make_unet(seed=1)
    again = replay(plan, other)
    pruned = cut(other, again)

    assert again.layers == plan.layers
    assert (again.replayed_from, again.sha256) == (plan.sha256, again.content_sha256())
    assert again.base.weights_sha256 != plan.base.weights_sha256
    kept = plan.layers["conv_in"].outputs
    assert torch.equal(pruned.conv_in.weight, other.conv_in.weight[kept])


def drop_a_layer(content):
    """Remove one layer."""
    content["layers"].pop("conv_out")


def swap_a_channel(content):
    """Replace one kept channel."""
    content["layers"]["conv_in"]["outputs"][0] = content["groups"][0]["cut"][0] + 100


def cut_one_more(content):
    """Cut more channels from a group than its layers lose."""
    group = next(group for group in content["groups"] if group["cut"] and group["blocks"] == 1)
    group["cut"] = sorted({*group["cut"], *range(2)})


def cut_beyond_the_width(content):
    """Cut a channel that does not exist."""
    content["groups"][0]["cut"] = [10_000]


def cut_a_whole_group(content):
    """Cut every channel of one group."""
    content["groups"][0]["cut"] = list(range(content["groups"][0]["width"]))


def drop_a_group(content):
    """Remove one group."""
    content["groups"].pop()


def cut_unevenly(content):
    """Cut two channels of one norm group and none of the others."""
    uneven = next(group for group in content["groups"] if group["blocks"] > 1 and group["cut"])
    uneven["cut"] = [0, 1]


def count_unknown_heads(content):
    """Add heads of an attention that does not exist."""
    content["heads"] = {"nowhere": 2}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop_a_layer, "channels of conv_out contradict its groups"),
        (swap_a_channel, "channels of conv_in contradict its groups"),
        (cut_one_more, "contradict its groups"),
        (cut_beyond_the_width, "cuts unknown, repeated or all"),
        (cut_a_whole_group, "cuts unknown, repeated or all"),
        (cut_unevenly, "unevenly: its 4 norm groups or heads must stay of equal size"),
        (count_unknown_heads, "has heads of nowhere, which no group cuts"),
        (drop_a_group, "groups differ from the model's"),
        (
            lambda c: c["base"].update(family="UNet2DConditionModel"),
            "for a UNet2DConditionModel, the model is a UNet2DModel",
        ),
        (lambda c: c["base"].update(architecture_sha256="0" * 64), "is for another architecture"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_plan_that_contradicts_itself_or_the_model_is_refused(written, unet, edit, message):
    """Even if its hash is correct."""
    with pytest.raises(InputError, match=message):
        check_plan(read_plan(written(edit)), unet)


@pytest.mark.parametrize("edit", [swap_a_channel, drop_a_layer, lambda c: c.update(criterion="random")])
def test_a_plan_with_a_wrong_hash_is_refused(written, edit):
    """Whichever field was changed."""
    with pytest.raises(InputError, match="was changed after it was written"):
        read_plan(written(edit, seal=False))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(version=1), "has version 1; supported: 2"),
        (lambda c: c.pop("groups"), "is not a valid pruning plan: groups: Field required"),
        (lambda c: c.update(surprise=1), "is not a valid pruning plan: surprise"),
        (lambda c: c["budget"].update(found="much"), "is not a valid pruning plan: budget.found"),
    ],
)
def test_a_file_that_is_not_a_plan_is_refused(written, edit, message):
    """Unknown version, unknown key, missing key or wrong type."""
    with pytest.raises(InputError, match=message):
        read_plan(written(edit, seal=False))


@pytest.mark.parametrize("changes", [{"layers_per_block": 2}, {"block_out_channels": (16, 48)}, {"norm_num_groups": 8}])
def test_a_plan_from_another_base_is_refused(make_unet, plan, changes):
    """More layers, other widths, or only other norm groups."""
    with pytest.raises(InputError, match=r"another architecture|groups differ from the model's"):
        check_plan(plan, make_unet(**changes))
