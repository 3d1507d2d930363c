"""Whatever fetch accepts can be drawn, scored and cut; anything else is refused in one line."""

import json
import sys

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.fetch.model import fetch_model
from stages.fetch.params import FolderModel
from stages.importance.measure import CalibrationBatch, measure_importance
from stages.models.families import example_inputs
from stages.models.layout import CLASS_EMBEDDING, WEIGHTS
from stages.models.pipeline import read_unet
from stages.models.trial import SMALL_SIZE, _score_and_cut, _shrink, check_prunable
from stages.prune.params import PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.runtime.errors import InputError, SignalExit
from stages.storage.files import read_json, write_json
from stages.storage.tensors import write_tensors

UNCONDITIONAL = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
CONDITIONAL = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
RESNETS = {
    "down_block_types": ("CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "CrossAttnUpBlock2D"),
}
SIMPLE = {
    "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
}
K_BLOCKS = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
    "up_block_types": ("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
    "mid_block_type": None,
    "layers_per_block": 2,
    "norm_num_groups": None,
    "time_embedding_type": "fourier",
    "conv_in_kernel": 1,
    "conv_out_kernel": 1,
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_act_fn": "gelu",
}
ADM_BLOCKS = {"downsample_type": "resnet", "upsample_type": "resnet", "attention_head_dim": 8}
SKIPS = {
    "block_out_channels": (32, 64),
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
}


def save(folder, *, conditional=False, **config):
    """Write a model whose config is unusual in one respect."""
    torch.manual_seed(0)
    cls, usual = (UNet2DConditionModel, CONDITIONAL) if conditional else (UNet2DModel, UNCONDITIONAL)
    cls(**{**usual, **config}).save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    if conditional:
        write_json(folder / CLASS_EMBEDDING / "config.json", {"num_classes": 4, "width": 12, "unconditional": 4})
        write_tensors(folder / CLASS_EMBEDDING / WEIGHTS, {"weight": torch.randn(5, 12)})
    return FolderModel(source="folder", path=folder)


@pytest.mark.parametrize(
    "config",
    [
        {"resnet_time_scale_shift": "scale_shift"},
        {"downsample_type": "resnet", "upsample_type": "resnet"},
        {"add_attention": False, "attention_head_dim": 8},
        {"center_input_sample": True, "norm_num_groups": 8},
        {"time_embedding_type": "learned", "num_train_timesteps": 1000},
        {"num_class_embeds": 5, "out_channels": 6, "resnet_time_scale_shift": "scale_shift", **ADM_BLOCKS},
        {"num_class_embeds": 5, "class_embed_type": "timestep"},
        {"conditional": True, "out_channels": 8},
        {"conditional": True, "use_linear_projection": True, "mid_block_type": None},
        {"conditional": True, "only_cross_attention": True, "upcast_attention": True},
        {"conditional": True, "resnet_skip_time_act": True, "resnet_out_scale_factor": 1.4, **RESNETS},
        {"conditional": True, "timestep_post_act": "silu", "mid_block_type": "UNetMidBlock2D"},
    ],
    ids=str,
)
def test_what_fetch_accepts_can_be_scored_and_cut(tmp_path, config):
    """Every unusual architecture that passes is cut as planned, whose verification compares every tensor."""
    unet = fetch_model(save(tmp_path / "model", **config), tmp_path / "out").unet
    images = torch.randn(2, unet.config["in_channels"], 8, 8)
    condition = {name: rows[:2] for name, rows in example_inputs(unet, 3).items() if name not in ("sample", "timestep")}
    importance = measure_importance(
        unet,
        DDPMScheduler(),
        [CalibrationBatch(images, images, condition)],
        [0, 500],
        criterion="taylor",
        formula="paper",
        label=None,
    )
    pruned = cut(unet, plan_pruning(unet, importance, PruneParams(target={"ratio": 0.5})))
    assert pruned.conv_in.out_channels < unet.conv_in.out_channels


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"conditional": True, **SIMPLE},
            "has down_block_types SimpleCrossAttnDownBlock2D, which holds attention",
        ),
        ({"conditional": True, **K_BLOCKS}, "has down_block_types KDownBlock2D, which holds norms"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type fourier, which takes the logarithm of the timestep"),
        ({"time_embedding_type": "learned", "num_train_timesteps": 100}, "num_train_timesteps of the UNet is 100"),
        ({**SKIPS, "norm_num_groups": None}, "conv_in feeds .* in uneven parts; such a model cannot be pruned"),
        ({"conditional": True, "attention_type": "gated"}, "attention_type 'gated'; supported: default"),
        ({"conditional": True, "dual_cross_attention": True}, "the model does not run"),
        ({"conditional": True, "time_cond_proj_dim": 8}, "with further conditions; .*time_cond_proj_dim is 8"),
        ({"class_embed_type": "identity"}, "class_embed_type 'identity', which adds vectors from outside"),
        ({"conditional": True, "num_class_embeds": 4}, "class labels beside cross-attention .num_class_embeds is 4"),
        ({"sample_size": 7}, "the model does not run"),
        ({"out_channels": 9}, "in_channels is 3, out_channels 9; no others"),
        ({"in_channels": 5}, "in_channels is 5, out_channels 3; no fixed condition"),
        ({"conditional": True, "in_channels": 9}, "in_channels is 9, out_channels 4; no fixed condition"),
    ],
    ids=str,
)
def test_what_cannot_be_drawn_scored_or_cut_is_refused(tmp_path, config, message):
    """By fetch, in one line with the reason, and nothing is written."""
    source = save(tmp_path / "model", **config)

    with pytest.raises(InputError, match=message) as caught:
        fetch_model(source, tmp_path / "out")
    assert "\n" not in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "value"), [("in_channels", 3), ("out_channels", 3)])
def test_a_key_that_a_config_lacks_has_diffusers_default(tmp_path, key, value):
    """A config without one of the two numbers of channels is that of a model with three."""
    source = save(tmp_path / "model")
    config = read_json(tmp_path / "model" / "unet" / "config.json")
    assert config.pop(key) == value
    write_json(tmp_path / "model" / "unet" / "config.json", config)

    assert fetch_model(source, tmp_path / "out").unet.config[key] == value


def test_a_block_that_no_list_names_is_found_by_the_trial(tmp_path, monkeypatch):
    """Without the list of blocks, tracing, cutting or building still refuses them in one line."""
    monkeypatch.setattr("stages.models.families.unet.UNSUPPORTED_BLOCKS", {})
    for name, config in (("simple", SIMPLE), ("k", K_BLOCKS)):
        source = save(tmp_path / name, conditional=True, **config)
        with pytest.raises(InputError, match=r"cannot be pruned|such layers are not supported") as caught:
            fetch_model(source, tmp_path / "out")
        assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": 5}, "has down_block_types 5; supported: names of blocks"),
        ({"mid_block_type": 7}, "has mid_block_type 7; supported: names of blocks"),
        ({"in_channels": "3"}, "a model with '3' input and 3 output channels"),
    ],
    ids=str,
)
def test_values_of_other_types_are_refused(tmp_path, changes, message):
    """In one line with the key."""
    source = save(tmp_path / "model")
    path = tmp_path / "model" / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    with pytest.raises(InputError, match=message) as caught:
        fetch_model(source, tmp_path / "out")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("timestep", [500, 999])
def test_a_model_that_fails_at_its_middle_or_last_timestep_only_is_refused(tmp_path, timestep):
    """A row of the learned timesteps that is not finite would be found after hours."""
    save(tmp_path / "model", time_embedding_type="learned", num_train_timesteps=1000)
    unet = read_unet(tmp_path / "model")
    with torch.no_grad():
        unet.time_proj.weight[timestep] = 1e38
        unet.save_pretrained(tmp_path / "model" / "unet")

    with pytest.raises(InputError, match=f"output is not finite at timestep {timestep}; use another checkpoint"):
        fetch_model(FolderModel(source="folder", path=tmp_path / "model"), tmp_path / "out")


def test_the_cut_is_tried_once_for_a_structure(make_unet, monkeypatch):
    """Models of the same structure share the outcome; a refusal names the model that it is of."""
    check_prunable(make_unet(sample_size=24), "first")
    monkeypatch.setattr("stages.models.trial.find_groups", pytest.fail)
    check_prunable(make_unet(seed=1, sample_size=24), "second")
    for origin in ("third", "fourth"):
        with pytest.raises(InputError, match=rf"^{origin}: the model does not run"):
            check_prunable(make_unet(sample_size=7), origin)


def test_large_images_are_tried_small():
    """256×256 with six levels, 64×64 latents with four; sides stay multiples of the downsampling, 28 stays 28."""
    for size, levels, expected in ((256, 6, 32), (64, 4, 32), (32, 4, 32), (28, 3, 28), (96, 3, 48), (256, 8, 128)):
        images = _shrink(torch.zeros(1, 3, size, size), 2 ** (levels - 1))
        assert images.shape == (1, 3, expected, expected)
        assert size < 2 * SMALL_SIZE or size > expected


def test_the_trial_leaves_the_model_as_it_is(unet):
    """It cuts a copy."""
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    _score_and_cut.__wrapped__(unet)  # also where a model of this structure was tried before

    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_the_end_of_this_process_is_no_fault_of_a_model(make_unet, monkeypatch):
    """A signal may come in the middle of a pass; a class of anyone's that calls sys.exit is refused."""
    unet = make_unet(sample_size=20)

    def end(*_):
        raise SignalExit(143)

    def leave(*_):
        sys.exit(1)

    monkeypatch.setattr("stages.models.trial.forward", end)
    with pytest.raises(SignalExit):
        check_prunable(unet, "mine")
    monkeypatch.setattr("stages.models.trial.forward", leave)
    with pytest.raises(InputError, match="mine: the model does not run"):
        check_prunable(unet, "mine")
