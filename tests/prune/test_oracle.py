"""The selection equals that of both implementations of Diff-Pruning, channel by channel (tests/oracle)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.importance.measure import CalibrationBatch, measure_importance
from stages.models.complexity import count_params
from stages.prune.params import PruneParams, Target
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.tools.one_shot import plan_one_shot
from tests.numpy_weights import draw_weights

ORACLE = sorted((Path(__file__).parents[1] / "oracle").glob("*.json"))
FORMULA = {"ddpm_exp": "paper", "ddpm_prune": "diffusers"}


def rebuild(record):
    """Build the model, calibration images and noise of a record from numpy's generator."""
    unet = UNet2DModel(**record["config"]).eval()
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    draws = np.random.RandomState(record["seed"])
    draw_weights(unet, draws)
    shape = (record["batch"], 3, unet.config["sample_size"], unet.config["sample_size"])
    images = np.clip(draws.standard_normal(shape), -1, 1)
    return unet, torch.from_numpy(images).float(), torch.from_numpy(draws.standard_normal(shape)).float()


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.e2e] * path.stem.startswith("cifar10"))  # at its real size
        for path in ORACLE
    ],
)
def test_the_selection_equals_the_original(path):
    """Interleaved scoring cuts the same channels of the same groups in the same order (reference)."""
    record = json.loads(path.read_text())
    unet, images, noise = rebuild(record)
    plan = plan_one_shot(
        unet,
        DDPMScheduler(),
        images,
        noise,
        range(0, 1000, record["stride"])[: record["max_steps"]],
        criterion=record["criterion"],
        formula=FORMULA[record["engine"]],
        threshold=record["thr"],
        order="interleaved",
        ratio=record["ratio"],
        seed=record["seed"],
    )

    assert [(group.root, group.blocks, group.cut) for group in plan.groups] == [
        (group["root"], group["ch_groups"], group["pruned"]) for group in record["groups"]
    ]
    pruned = cut(unet, plan)
    assert count_params(pruned) == record["params_after"]
    assert {name: list(tensor.shape) for name, tensor in pruned.state_dict().items()} == record["shapes_after"]


@pytest.mark.parametrize("timesteps_per_pass", [1, 3, 64])
@pytest.mark.parametrize("path", [path for path in ORACLE if path.stem.startswith("tiny")], ids=lambda path: path.stem)
def test_losses_equal_the_original(path, timesteps_per_pass):
    """The sum ends at the same timestep for any number of timesteps per pass (reference)."""
    record = json.loads(path.read_text())
    unet, images, noise = rebuild(record)
    importance = measure_importance(
        unet,
        DDPMScheduler(),
        [CalibrationBatch(images, noise)],
        range(0, 1000, record["stride"])[: record["max_steps"]],
        criterion=record["criterion"],
        formula=FORMULA[record["engine"]],
        threshold=record["thr"],
        timesteps_per_pass=timesteps_per_pass,
    )
    plan = plan_pruning(unet, importance, PruneParams(target=Target(ratio=record["ratio"])), record["seed"])

    np.testing.assert_allclose(importance.losses[0] if importance.losses else [], record["losses"], rtol=1e-5)
    assert [group.cut for group in plan.groups] == [group["pruned"] for group in record["groups"]]


def test_upfront_order_selects_other_channels():
    """Scores on dense widths select other channels in all groups but the first."""
    path = next(path for path in ORACLE if path.stem == "tiny.ddpm_prune.magnitude")
    record = json.loads(path.read_text())
    unet, images, noise = rebuild(record)
    chosen = {"criterion": "magnitude", "formula": "diffusers", "ratio": 0.3}
    orders = [
        plan_one_shot(unet, DDPMScheduler(), images, noise, [], order=order, **chosen)
        for order in ("interleaved", "upfront")
    ]

    assert [len(group.cut) for group in orders[0].groups] == [len(group.cut) for group in orders[1].groups]
    assert orders[0].groups[0].cut == orders[1].groups[0].cut  # both orders score the first group on dense widths
    assert orders[0].groups != orders[1].groups
