"""Stock configs and plain diffusers."""

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
PLAIN = """
import sys
from safetensors.torch import load_file, save_file
from diffusers import AutoModel, DDPMPipeline, UNet2DModel
assert not [name for name in sys.modules if name.startswith(("stages", "torch_pruning"))]
custom, stock, given, out = sys.argv[1:]
inputs = load_file(given)
models = {
    "auto": AutoModel.from_pretrained(f"{custom}/unet", trust_remote_code=True),
    "pipeline": DDPMPipeline.from_pretrained(custom, trust_remote_code=True).unet,
    "stock": UNet2DModel.from_pretrained(stock, subfolder="unet"),
}
save_file({name: model.eval()(**inputs).sample.detach().contiguous() for name, model in models.items()}, out)
"""


@pytest.fixture
def wide(make_unet):
    """A UNet whose first block is wide enough for the table of timesteps."""
    return make_unet(**WIDE)


def test_a_uniform_cut_is_a_stock_model(wide, magnitude_of, scheduler, tmp_path):
    """Every group loses a quarter: diffusers' own class loads it, and the outputs are equal to float32 accuracy."""
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
def test_heads_may_be_narrower_or_fewer(make_unet, magnitude_of, heads):
    """Either is a stock config of its own."""
    unet = make_unet(**WIDE, attention_head_dim=32)
    pruned = cut(unet, plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.25}, heads=heads)))
    stock, _ = to_stock(pruned, 1000)

    assert stock.config["attention_head_dim"] == {"width": 24, "whole": 32}[heads]


def test_uneven_widths_are_refused(wide, magnitude_of):
    """The first layer that stands out is named."""
    pruned = cut(wide, plan_pruning(wide, magnitude_of(wide), PruneParams(target={"ratio": 0.3})))

    with pytest.raises(InputError, match=r"no stock config has these widths \(time_embedding\.linear_1\.bias is"):
        to_stock(pruned, 1000)


def test_a_first_block_too_narrow_for_the_timesteps_is_refused(make_unet, magnitude_of):
    """The table of 1,000 sinusoids does not fit into 12 columns; the error is measured and named."""
    unet = make_unet()
    pruned = cut(unet, plan_pruning(unet, magnitude_of(unet), PruneParams(target={"ratio": 0.25})))

    with pytest.raises(InputError, match="first block is too narrow for the table of timesteps: outputs differ by"):
        to_stock(pruned, 1000)


@pytest.fixture
def folders(wide, magnitude_of, scheduler, tmp_path):
    """A pruned model with its code, the same as a stock model, inputs, and the outputs that must come of them."""
    pruned = cut(wide, plan_pruning(wide, magnitude_of(wide), PruneParams(target={"ratio": 0.25})))
    write_pipeline(tmp_path / "custom", pruned, scheduler)
    write_pipeline(tmp_path / "stock", to_stock(pruned, 1000)[0], scheduler)
    inputs = {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([3, 997])}
    save_file(inputs, tmp_path / "inputs.safetensors")
    return tmp_path, pruned(**inputs).sample


def load_plainly(python, folders):
    """Load all of them in a process without the project, and compare."""
    from safetensors.torch import load_file

    folder, expected = folders
    places = [str(folder / name) for name in ("custom", "stock", "inputs.safetensors", "outputs.safetensors")]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # sums are split by thread
        "PATH": "/usr/bin:/bin",
    }
    subprocess.run([python, "-c", PLAIN, *places], check=True, cwd=folder, env=environment, capture_output=True)
    found = load_file(places[-1])

    assert torch.equal(found["auto"], expected)
    assert torch.equal(found["pipeline"], expected)
    torch.testing.assert_close(found["stock"], expected, rtol=1e-4, atol=1e-5)


def test_plain_diffusers_opens_both(folders):
    """In a process that imports nothing of this project."""
    load_plainly(sys.executable, folders)


@pytest.mark.network
def test_a_clean_environment_opens_both(folders, tmp_path):
    """One that has only torch, diffusers and safetensors."""
    from importlib.metadata import version

    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    uv = Path(sys.executable).with_name("uv")
    packages = [f"{name}=={version(name)}" for name in ("torch", "diffusers", "safetensors")]
    subprocess.run([uv, "pip", "install", "--python", python, *packages], check=True, capture_output=True)

    load_plainly(str(python), folders)
