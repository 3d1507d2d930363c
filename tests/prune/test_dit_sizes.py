"""DiT-XL/2 at two ratios, counted from its config on the meta device."""

import pytest
import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

from stages.fetch.convert import SYSTEMS
from stages.models.complexity import count_attention_macs, count_macs, count_params
from stages.models.groups import find_groups
from stages.models.shortcuts import without_branches
from stages.prune.budget import cut_ratio
from stages.prune.params import PruneParams
from stages.prune.path import find_path
from stages.prune.width_cost import WidthCost
from stages.storage.files import read_json


@pytest.mark.e2e
def test_the_size_of_dit_xl_is_the_published_one():
    """749.83 M parameters; 114.44 G MACs in layers with weights, 4.23 G in products of attention."""
    with torch.device("meta"):
        model = DiTTransformer2DModel.from_config(read_json(SYSTEMS / "imagenet-dit.json"))
    norms = 57 * 256 * 1152  # torch-pruning counts one for each value of a norm without weights

    assert round(count_params(model) / 1e6, 2) == 749.83
    assert round((count_macs(model) - norms) / 1e9, 2) == 114.44
    assert round((count_macs(model) - norms + count_attention_macs(model)) / 1e9, 2) == 118.67


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("ratio", "heads", "params_m", "macs_g"),
    [
        (0.3, "width", 617.1874, 80.5181),
        (0.3, "whole", 623.3845, 82.1035),
        (0.5, "width", 526.7601, 57.3804),
        (0.5, "whole", 526.7601, 57.3804),
    ],
)
def test_the_sizes_of_a_cut_dit_xl(ratio, heads, params_m, macs_g):
    """Those of docs/models.md; that the formula counts what a real cut leaves is tested on small models."""
    with torch.device("meta"):
        model = DiTTransformer2DModel.from_config(read_json(SYSTEMS / "imagenet-dit.json"))
    groups = find_groups(model)
    params = PruneParams(target={"ratio": ratio}, heads=heads)
    steps = find_path(groups, [torch.ones(group.width) for group in groups], params)
    costs = WidthCost(model, groups, heads=heads, latency_repeats=3)
    cuts = cut_ratio(ratio, steps, groups, params.round_to, heads)

    assert (round(costs.params(cuts) / 1e6, 4), round(costs.macs(cuts) / 1e9, 4)) == (params_m, macs_g)


@pytest.mark.e2e
def test_the_size_of_half_a_dit_xl():
    """14 of 28 blocks, whichever they are, as in docs/models.md."""
    with torch.device("meta"):
        model = DiTTransformer2DModel.from_config(read_json(SYSTEMS / "imagenet-dit.json"))
    half = without_branches(model, [f"transformer_blocks.{index}" for index in range(1, 28, 2)])

    assert (round(count_params(half) / 1e6, 4), round(count_macs(half) / 1e9, 4)) == (376.2697, 57.2378)
