"""ADM's UNet for ImageNet 64, counted from its config on the meta device."""

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from stages.fetch.convert import SYSTEMS
from stages.models.complexity import count_macs, count_params
from stages.models.groups import find_groups
from stages.prune.params import PruneParams
from stages.prune.path import cuts_after, find_path
from stages.prune.width_cost import WidthCost
from stages.storage.files import read_json


@pytest.mark.e2e
def test_the_sizes_are_those_of_the_docs():
    """The authors' code has 295,904,454 parameters, too; the cut is the one of docs/models.md at ratio 0.3."""
    with torch.device("meta"):
        unet = UNet2DModel.from_config(read_json(SYSTEMS / "imagenet-adm-64.json"))
    groups, params = find_groups(unet), PruneParams(target={"ratio": 0.3})
    steps = find_path(groups, [torch.ones(group.width) for group in groups], params)
    costs = WidthCost(unet, groups, heads="width", latency_repeats=3)
    cuts = cuts_after([step for step in steps if step.key <= 0.3], len(groups))

    assert (count_params(unet), round(count_macs(unet) / 1e9, 4)) == (295_904_454, 103.5667)
    assert (round(costs.params(cuts) / 1e6, 4), round(costs.macs(cuts) / 1e9, 4)) == (153.7668, 59.9927)
