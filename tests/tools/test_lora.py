"""An adapter of the dense model, sliced by a pruning plan, is one of the pruned model."""

import json

import pytest
import torch
from click.testing import CliRunner
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from stages.importance.measure import measure_importance
from stages.models.branches import find_branches, removable
from stages.models.layout import PLAN
from stages.models.pipeline import read_unet, write_pipeline
from stages.models.shortcuts import without_branches
from stages.prune.params import PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut, slice_tensors
from stages.runtime.errors import InputError
from stages.storage.files import read_json, write_json
from stages.storage.tensors import read_metadata, read_tensors
from stages.tools.__main__ import main
from stages.tools.lora_slicing import ADAPTED, slice_adapter
from tests.loras import LAYOUTS, PEFT, SCALE, make_lora, merge, product

MODELS = {
    "unet": st.fixed_dictionaries(
        {
            "block_out_channels": st.sampled_from([(8, 16), (16, 32)]),
            "attention_head_dim": st.sampled_from([None, 4]),
            "num_class_embeds": st.sampled_from([None, 3]),
        }
    ),
    "conditional": st.fixed_dictionaries(
        {"use_linear_projection": st.booleans(), "attention_head_dim": st.sampled_from([2, 4])}
    ),
    "dit": st.fixed_dictionaries(
        {"num_attention_heads": st.sampled_from([2, 4]), "activation_fn": st.sampled_from(["gelu-approximate", "gelu"])}
    ),
}
PLANS = st.fixed_dictionaries(
    {
        "target": st.floats(0.1, 0.6).map(lambda ratio: {"ratio": ratio}),
        "ranking": st.sampled_from(["uniform", "global"]),
        "heads": st.sampled_from(["width", "whole"]),
        "order": st.just("upfront"),
    }
)
SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "phases": [Phase.generate],  # shrinking builds models for minutes
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}


@pytest.fixture
def build(make_unet, make_dit):
    """Build a small dense model of a family."""

    def build_conditional(**changes):
        torch.manual_seed(0)
        widths = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
        blocks = {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        }
        channels = {"in_channels": 3, "out_channels": 3, "cross_attention_dim": 6}
        return UNet2DConditionModel(**widths, **blocks, **channels, **changes).eval()

    return {"unet": make_unet, "conditional": build_conditional, "dit": make_dit}


def make_plan(dense, seed=0, removed=(), **params):
    """Plan a cut by random scores."""
    importance = measure_importance(dense, DDPMScheduler(), [], [], criterion="random", formula="paper")
    return plan_pruning(dense, importance, PruneParams(**params), seed, removed=removed)


def adapted(model):
    """Name the layers that a LoRA can adapt."""
    return [name for name, module in model.named_modules() if isinstance(module, ADAPTED)]


def check_equality(dense, plan, layout, *, exact):
    """Assert that W + s·B·A sliced is W sliced + s·(B sliced)·(A sliced), for every layer that is left.

    With integers as factors bit for bit; with others up to the rounding of sums of r products in any order.
    """
    layers = [
        name for name in adapted(dense) if layout == "peft" or not isinstance(dense.get_submodule(name), nn.Embedding)
    ]
    tensors, names = make_lora(dense, layers, layout, exact=exact)
    sliced = slice_adapter(tensors, dense, plan)
    merged = type(dense).from_config(dense.config)
    merged.load_state_dict(merge(dense, tensors, names))
    expected, weights = slice_tensors(merged, plan), slice_tensors(dense, plan)
    left = dict(without_branches(dense, [branch.name for branch in plan.removed]).named_modules())

    assert sliced.dropped == sorted(set(layers) - left.keys())
    for layer, (down, up, *bias) in names.items():
        if layer in sliced.dropped:
            assert not {down, up, *bias} & sliced.tensors.keys()
            continue
        module, factors = dense.get_submodule(layer), (sliced.tensors[down], sliced.tensors[up])
        found = weights[f"{layer}.weight"] + SCALE * product(module, *factors)
        bound = 8 * torch.finfo(torch.float32).eps * (1 + product(module, *(factor.abs() for factor in factors)))
        difference = (found - expected[f"{layer}.weight"]).abs()
        assert torch.equal(found, expected[f"{layer}.weight"]) if exact else (difference <= bound).all(), layer
        if bias:
            added = weights[f"{layer}.bias"] + SCALE * sliced.tensors[bias[0]]
            assert torch.equal(added, expected[f"{layer}.bias"])
    return sliced


def check_any(build, family, config, params, seed, depth, layout):
    """Build a model, plan a cut of it, with or without depth, and check exact and other factors."""
    dense = build[family](**config)
    branches = removable(find_branches(dense)) if depth else []
    try:
        plan = make_plan(dense, seed, [branches[seed % len(branches)].name] if branches else (), **params)
    except InputError:  # the ratio leaves too little of so small a model
        return
    for exact in (True, False):
        check_equality(dense, plan, layout, exact=exact)


ANY = {"params": PLANS, "seed": st.integers(0, 99), "depth": st.booleans(), "layout": st.sampled_from(list(LAYOUTS))}


@settings(max_examples=3, **SETTINGS)
@pytest.mark.parametrize("family", MODELS)
@given(data=st.data())
def test_a_slice_of_the_sum_is_the_sum_of_the_slices(build, family, data):
    """For linear layers, convolutions, attentions, GEGLU and embeddings, whatever the plan keeps."""
    check_any(build, family, data.draw(MODELS[family]), **{name: data.draw(it) for name, it in ANY.items()})


@pytest.mark.e2e
@settings(max_examples=40, **SETTINGS)
@pytest.mark.parametrize("family", MODELS)
@given(data=st.data())
def test_a_slice_of_any_sum_is_the_sum_of_the_slices(build, family, data):
    """The same for many more models and plans."""
    check_any(build, family, data.draw(MODELS[family]), **{name: data.draw(it) for name, it in ANY.items()})
