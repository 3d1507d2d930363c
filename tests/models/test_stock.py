"""Stock models, and loading with plain diffusers."""

import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from safetensors.torch import save_file

from stages.models.pipeline import read_unet, write_pipeline
from stages.models.stock import TOLERANCE, to_stock
from stages.prune.params import PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.runtime.errors import InputError
from stages.storage.files import read_json

WIDE = {"block_out_channels": (128, 256), "norm_num_groups": 32, "sample_size": 8}
LOAD_SCRIPT = """
import sys
from safetensors.torch import load_file, save_file
from diffusers import AutoModel, DDPMPipeline, UNet2DModel
assert not [name for name in sys.modules if name.startswith(("stages", "torch_pruning"))]
custom, stock, inputs_path, outputs_path, copy = sys.argv[1:]
inputs = load_file(inputs_path)
pipeline = DDPMPipeline.from_pretrained(custom, trust_remote_code=True)
pipeline.save_pretrained(copy)
models = {
    "auto": AutoModel.from_pretrained(f"{custom}/unet", trust_remote_code=True),
    "pipeline": pipeline.unet,
    "stock": UNet2DModel.from_pretrained(stock, subfolder="unet"),
}
save_file({name: model.eval()(**inputs).sample.detach().contiguous() for name, model in models.items()}, outputs_path)
"""


@pytest.fixture
def wide(make_unet):
    """A UNet whose first block is wide enough for the table of timesteps."""
    return make_unet(**WIDE)


def test_a_uniform_cut_is_a_stock_model(wide, magnitude_of, scheduler, tmp_path):
    """After a uniform cut by a quarter, diffusers' own class loads the model, with outputs equal in float32."""
    pruned = cut(wide, plan_pruning(wide, magnitude_of(wide), PruneParams(target={"ratio": 0.25})))
    stock, error = to_stock(pruned, 1000)
    write_pipeline(tmp_path / "stock", stock, scheduler)
    loaded = UNet2DModel.from_pretrained(tmp_path / "stock", subfolder="unet").eval()
    noise, step = torch.randn(2, 1, 8, 8), torch.tensor([3, 997])

    assert error < TOLERANCE
    assert read_json(tmp_path / "stock/unet/config.json")["block_out_channels"] == [96, 192]
    torch.testing.assert_close(loaded(noise, step).sample, pruned(noise, step).sample, rtol=1e-4, atol=1e-5)
    assert torch.equal(read_unet(tmp_path / "stock")(noise, step).sample, loaded(noise, step).sample)


@pytest.mark.parametrize("heads", ["width", "whole"])
def test_narrower_and_fewer_heads_have_stock_configs(make_unet, magnitude_of, heads):
    """A narrower head changes attention_head_dim, fewer heads do not."""
    unet = make_unet(**WIDE, attention_head_dim=32)
    pruned = cut(unet, plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.25}, heads=heads)))
    stock, _ = to_stock(pruned, 1000)

    assert stock.config["attention_head_dim"] == {"width": 24, "whole": 32}[heads]


def test_uneven_widths_are_refused(wide, magnitude_of):
    """The error names the first layer with another width."""
    pruned = cut(wide, plan_pruning(wide, magnitude_of(wide), PruneParams(target={"ratio": 0.3})))

    with pytest.raises(InputError, match=r"no stock config has these widths \(time_embedding\.linear_1\.bias is"):
        to_stock(pruned, 1000)


def test_fewer_timesteps_than_the_width_leave_columns_of_zeros(make_unet, magnitude_of):
    """A table of 20 timesteps has rank 20, and the width is 24."""
    unet = make_unet(**WIDE)
    pruned = cut(unet, plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.25})))
    stock, difference = to_stock(pruned, 20)

    assert stock.config["num_train_timesteps"] == 20 < stock.config["block_out_channels"][0]
    assert difference < 1e-5


def test_a_first_block_too_narrow_for_the_timestep_table_is_refused(make_unet, magnitude_of):
    """The table of 1,000 sinusoids does not fit into 12 columns; the error gives the measured difference."""
    unet = make_unet()
    pruned = cut(unet, plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.25})))

    with pytest.raises(InputError, match="first block is too narrow for the table of timesteps: outputs differ by"):
        to_stock(pruned, 1000)


@pytest.fixture
def folders(wide, magnitude_of, scheduler, tmp_path):
    """A pruned model with its code, its stock model, inputs, and the expected outputs."""
    pruned = cut(wide, plan_pruning(wide, magnitude_of(wide), PruneParams(target={"ratio": 0.25})))
    write_pipeline(tmp_path / "custom", pruned, scheduler)
    write_pipeline(tmp_path / "stock", to_stock(pruned, 1000)[0], scheduler)
    inputs = {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([3, 997])}
    save_file(inputs, tmp_path / "inputs.safetensors")
    return tmp_path, pruned(**inputs).sample


def check_plain_loading(python, folders):
    """Load both models in a process without the project, and compare the outputs.

    Then what that process saved is loaded, with another cache of code: on another machine.
    """
    from safetensors.torch import load_file

    folder, expected = folders
    environment = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # sums are split by thread
        "PATH": "/usr/bin:/bin",
    }
    for custom, copy in (("custom", "copy"), ("copy", "copy of the copy")):
        paths = [str(folder / it) for it in (custom, "stock", "inputs.safetensors", "outputs.safetensors", copy)]
        environment["HF_HOME"] = str(folder / f"home of {custom}")
        subprocess.run([python, "-c", LOAD_SCRIPT, *paths], check=True, cwd=folder, env=environment)
        found = load_file(folder / "outputs.safetensors")
        assert torch.equal(found["auto"], expected)
        assert torch.equal(found["pipeline"], expected)
        torch.testing.assert_close(found["stock"], expected, rtol=1e-4, atol=1e-5)


def test_plain_diffusers_loads_both(folders):
    """A process that imports nothing of this project loads the pruned and the stock model."""
    check_plain_loading(sys.executable, folders)


@pytest.mark.network
def test_a_clean_environment_loads_both(folders, tmp_path):
    """An environment with only torch, diffusers and safetensors loads both models."""
    from importlib.metadata import version

    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    uv = Path(sys.executable).with_name("uv")
    packages = [f"{name}=={version(name)}" for name in ("torch", "diffusers", "safetensors")]
    subprocess.run([uv, "pip", "install", "--python", python, *packages], check=True, capture_output=True)

    check_plain_loading(str(python), folders)
