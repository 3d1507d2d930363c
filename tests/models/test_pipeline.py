"""Reading and writing diffusers pipeline folders."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from stages.models.checks import check_images
from stages.models.layout import WEIGHTS
from stages.models.pipeline import read_scheduler, read_unet, write_pipeline
from stages.prune.params import PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.runtime.errors import InputError
from stages.storage.files import read_json, write_json
from stages.storage.tensors import read_tensors, write_tensors

X, T = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700])


def test_a_dense_folder_is_a_plain_diffusers_folder(model_folder, unet):
    """Diffusers and read_unet both load it bit for bit."""
    by_diffusers = UNet2DModel.from_pretrained(model_folder, subfolder="unet", low_cpu_mem_usage=False)

    for loaded in (by_diffusers, read_unet(model_folder)):
        assert torch.equal(loaded(X, T).sample, unet(X, T).sample)


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_a_pruned_folder_loads_bit_for_bit(tmp_path, unet, scheduler, magnitude, ratio):
    """The loaded model has the same widths and outputs, and the config keeps the dense block_out_channels."""
    pruned = cut(unet, plan_pruning(unet, magnitude, PruneParams(target={"ratio": ratio})))
    write_pipeline(tmp_path / "pruned", pruned, scheduler)
    loaded = read_unet(tmp_path / "pruned")

    assert torch.equal(loaded(X, T).sample, pruned(X, T).sample)
    assert {name: tensor.shape for name, tensor in loaded.state_dict().items()} == {
        name: tensor.shape for name, tensor in pruned.state_dict().items()
    }
    assert all(not tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert read_json(tmp_path / "pruned/unet/config.json")["block_out_channels"] == [16, 32]


def test_width_attributes_match_the_tensors(tmp_path, unet, scheduler, magnitude):
    """The width attributes of a loaded model's layers are the shapes of their weights."""
    write_pipeline(
        tmp_path / "pruned", cut(unet, plan_pruning(unet, magnitude, PruneParams(target={"ratio": 0.3}))), scheduler
    )

    for name, module in read_unet(tmp_path / "pruned").named_modules():
        if isinstance(module, torch.nn.Conv2d):
            assert (module.out_channels, module.in_channels) == module.weight.shape[:2], name
        elif isinstance(module, torch.nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape, name
        elif isinstance(module, torch.nn.GroupNorm):
            assert (module.num_channels,) == module.weight.shape, name


@pytest.mark.e2e
def test_loading_needs_no_torch_pruning(model_folder):
    """A pruned model can be used without the pruning library."""
    code = (
        "import sys; sys.modules['torch_pruning'] = None\n"
        "from pathlib import Path; from stages.models.pipeline import read_unet\n"
        f"read_unet(Path({str(model_folder)!r}))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=root).returncode == 0


def test_the_flat_folder_layout_loads(tmp_path, model_folder, unet):
    """As in google/ddpm-cifar10-32, UNet and scheduler may be at the top of the folder."""
    for part in ("unet", "scheduler"):
        shutil.copytree(model_folder / part, tmp_path / "flat", dirs_exist_ok=True)

    assert torch.equal(read_unet(tmp_path / "flat")(X, T).sample, unet(X, T).sample)
    assert read_scheduler(tmp_path / "flat").config["num_train_timesteps"] == 1000


def test_old_attention_names_load(model_folder, unet):
    """The Hub's DDPM UNets of 2022 name their projections query, key, value and proj_attn."""
    path = model_folder / "unet" / WEIGHTS
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = read_tensors(path)
    for new, old in old_names.items():
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    assert sum("proj_attn" in name for name in tensors) == 8  # four attentions, weight and bias
    write_tensors(path, tensors)

    assert torch.equal(read_unet(model_folder)(X, T).sample, unet(X, T).sample)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(model_folder, dtype):
    """Importance and training need float32, so float16 and bfloat16 weights are converted."""
    path = model_folder / "unet" / WEIGHTS
    write_tensors(path, {name: tensor.to(dtype) for name, tensor in read_tensors(path).items()})

    loaded = read_unet(model_folder)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert loaded(X, T).sample.isfinite().all()


def test_a_missing_model_folder_is_named(tmp_path):
    """The error gives the path."""
    with pytest.raises(InputError, match="nowhere does not exist"):
        read_unet(tmp_path / "nowhere")


def test_weights_of_another_model_are_refused(model_folder, make_unet, scheduler, tmp_path):
    """Tensors that do not fit the config cause one error line."""
    write_pipeline(tmp_path / "other", make_unet(layers_per_block=2), scheduler)
    shutil.copyfile(tmp_path / "other/unet" / WEIGHTS, model_folder / "unet" / WEIGHTS)

    with pytest.raises(InputError, match="the weights do not fit the config") as caught:
        read_unet(model_folder)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet3DConditionModel"}, "describes a UNet3DConditionModel; supported: UNet2DModel"),
        ({"addition_embed_type": "text"}, "describes a model with further conditions"),
        ({"num_class_embeds": 0}, "num_class_embeds 0; supported: the number of classes, or null"),
        (
            {"class_embed_type": "timestep"},
            "num_class_embeds None and class_embed_type timestep; supported: the number",
        ),
        ({"class_embed_type": "identity"}, "class_embed_type 'identity', .* supported: null, timestep"),
        ({"out_channels": 3}, "1 input and 3 output channels; supported: equal numbers, or twice as many outputs"),
        ({"sample_size": [8, 0]}, r"sample_size \[8, 0\]; supported: one positive integer, .* or \[height, width\]"),
        ({"sample_size": [8, 16, 16]}, r"sample_size \[8, 16, 16\]; supported: one positive integer"),
    ],
)
def test_an_unsupported_model_is_refused(model_folder, change, message):
    """The error gives what was found and what is supported."""
    config = json.loads((model_folder / "unet/config.json").read_text())
    write_json(model_folder / "unet/config.json", {**config, **change})

    with pytest.raises(InputError, match=message):
        read_unet(model_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction_type": "flow_prediction"}, "flow_prediction; supported: epsilon, v_prediction, sample"),
        ({"_class_name": "ScoreSdeVeScheduler"}, "describes a ScoreSdeVeScheduler; supported: DDIMScheduler, DDPM"),
    ],
)
def test_an_unsupported_noise_schedule_is_refused(model_folder, change, message):
    """Only predictions of ε, v or x₀ under DDPM's schedule are supported."""
    path = model_folder / "scheduler/scheduler_config.json"
    write_json(path, {**read_json(path), **change})

    with pytest.raises(InputError, match=message):
        read_scheduler(model_folder)


def test_images_of_another_size_are_refused(tmp_path):
    """The error gives both sizes."""
    pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8).numpy()

    with pytest.raises(InputError, match="holds 3×8×8 images, the model generates 1×8×8"):
        check_images(pixels, (1, 8, 8), tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.unet."])
def test_weights_under_a_prefix_name_it(model_folder, unet, prefix):
    """DistributedDataParallel and torch.compile put one before every name; the line is short and says so."""
    write_tensors(model_folder / "unet" / WEIGHTS, {f"{prefix}{key}": it for key, it in unet.state_dict().items()})

    with pytest.raises(InputError, match=f"remove the prefix {re.escape(prefix)} from every name") as caught:
        read_unet(model_folder)
    count = len(unet.state_dict())
    assert f"{count} missing" in caught.value.message
    assert f"{count} unexpected" in caught.value.message
    assert len(caught.value.format_message()) <= 300
