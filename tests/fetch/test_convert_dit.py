"""A checkpoint of the DiT authors becomes a diffusers folder with the same outputs, or is refused."""

import pytest
import torch
from diffusers import AutoencoderKL
from pydantic import ValidationError

from stages.fetch.convert import SYSTEMS, check_layout
from stages.fetch.convert_dit import add_autoencoder, convert_dit, dit_name
from stages.fetch.params import CheckpointModel
from stages.fetch.source_checkpoint import tensor_shapes
from stages.models.autoencoder import read_autoencoder
from stages.models.pipeline import CPU, read_unet
from stages.runtime.errors import InputError
from stages.storage.files import read_json
from tests import originals

DIFFUSERS_SPACING = 127


@pytest.fixture
def config():
    """The config of DiT-XL/2, made small."""
    small = {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
    return {**read_json(SYSTEMS / "imagenet-dit.json"), **small, "num_embeds_ada_norm": 5}


def original(spacing=DIFFUSERS_SPACING, seed=0):
    """A small DiT of the authors' code with random weights."""
    torch.manual_seed(seed)
    network = originals.DiT(24, 3, layers=2, classes=5, channels=4, size=8, patch=2, spacing=spacing)
    with torch.no_grad():
        for name, tensor in network.named_parameters():
            if name != "pos_embed":
                tensor.add_(torch.randn(tensor.shape), alpha=0.05)
    return network.eval().requires_grad_(requires_grad=False)


def inputs():
    """Noise, timesteps, and labels, that of no class among them."""
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 80, 999])


@torch.no_grad()
def error(folder, network):
    """Largest difference of the outputs, ε and variance, over the largest output."""
    labels = torch.tensor([0, 4, 5])
    found, expected = read_unet(folder)(*inputs(), labels).sample, network(*inputs(), labels)
    return float((found - expected).abs().max() / expected.abs().max())


def test_a_converted_dit_computes_what_the_original_computes(tmp_path, config):
    """With the frequencies of diffusers' timesteps; those of the authors lie a little closer together (reference)."""
    network = original()
    torch.save(network.state_dict(), tmp_path / "dit.pt")
    convert_dit(tmp_path / "dit.pt", config, tmp_path / "converted")

    assert error(tmp_path / "converted", network) < 1e-5
    assert 1e-4 < error(tmp_path / "converted", original(spacing=128)) < 0.2
    index = read_json(tmp_path / "converted" / "model_index.json")
    assert (index["_class_name"], index["transformer"]) == ("DiTPipeline", ["diffusers", "DiTTransformer2DModel"])
    noise = read_json(tmp_path / "converted" / "scheduler" / "scheduler_config.json")
    assert (noise["variance_type"], noise["clip_sample"]) == ("learned_range", False)


def test_the_ema_of_a_training_is_taken(tmp_path, config):
    """Unless ema is false."""
    states = {"model": original().state_dict(), "ema": original(seed=1).state_dict()}
    torch.save({**states, "opt": {}}, tmp_path / "dit.pt")
    for ema, seed in ((None, 1), (True, 1), (False, 0)):
        convert_dit(tmp_path / "dit.pt", config, tmp_path / "converted", ema)
        assert error(tmp_path / "converted", original(seed=seed)) < 1e-5


def test_every_tensor_of_dit_xl_has_a_name_in_the_original():
    """At full size, on the meta device; what the blocks share is read once."""
    config = read_json(SYSTEMS / "imagenet-dit.json")
    with torch.device("meta"):
        network = originals.DiT(1152, 16, layers=28, classes=1000, channels=4, size=32, patch=2)
    fused = {name.replace("qkv", side) for name in network.state_dict() for side in ("q", "k", "v")}

    assert {dit_name(name) for name in tensor_shapes(config)} == fused - {"pos_embed"} - {
        name for name in fused if "qkv" in name
    }


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("blocks.1.attn.qkv.weight", lambda _: None, "blocks.1.attn.qkv.weight is missing"),
        ("blocks.1.attn.qkv.weight", lambda tensor: tensor.sum(), r"shape \[\], which is not three of one width"),
        ("blocks.1.attn.qkv.bias", lambda tensor: tensor[:70], r"shape \[70\], which is not three of one width"),
        (
            "blocks.0.mlp.fc1.weight",
            lambda tensor: tensor[:90],
            r"fc1.weight has shape \[90, 24\], expected",
        ),
        ("blocks.2.mlp.fc1.weight", lambda _: torch.zeros(3), "an unexpected tensor blocks.2.mlp.fc1.weight"),
        ("pos_embed", lambda tensor: tensor + 1, r"pos_embed \[1, 16, 24\] is not that of 4×4 patches"),
        ("pos_embed", lambda tensor: tensor[:, :9], r"pos_embed \[1, 9, 24\] is not that of 4×4 patches"),
    ],
)
def test_a_dit_that_does_not_fit_is_refused(tmp_path, config, name, change, message):
    """In one line that names the tensor."""
    state = original().state_dict()
    changed = change(state.pop(name, None))
    torch.save({**state, **({} if changed is None else {name: changed.clone()})}, tmp_path / "dit.pt")

    with pytest.raises(InputError, match=message) as caught:
        convert_dit(tmp_path / "dit.pt", config, tmp_path / "converted")
    assert "\n" not in caught.value.message


def test_the_autoencoder_is_added(tmp_path):
    """From its own folder, or from vae/ of a pipeline; another class is refused."""
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).save_pretrained(tmp_path / "a" / "vae")
    for source in (tmp_path / "a", tmp_path / "a" / "vae"):
        add_autoencoder(source, tmp_path / "converted")
        assert read_autoencoder(tmp_path / "converted", CPU).scale == 0.18215
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text('{"_class_name": "Other"}')
    with pytest.raises(InputError, match="holds a Other; supported: AutoencoderKL"):
        add_autoencoder(tmp_path / "b", tmp_path / "converted")


@pytest.mark.parametrize("linked", ["config.json", "vae"])
def test_a_link_out_of_the_folder_of_an_autoencoder_is_refused(tmp_path, linked):
    """As out of the model's own folder."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_text("{}")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / linked).symlink_to(tmp_path / "outside" / ("config.json" if linked != "vae" else ""))
    with pytest.raises(InputError, match=f"{linked} is a link out of the model folder"):
        add_autoencoder(tmp_path / "here", tmp_path / "converted")


@pytest.mark.parametrize(
    ("layout", "system", "autoencoder", "message"),
    [
        ("dit", "imagenet-dit", None, "layout dit needs autoencoder"),
        ("ddim", "cifar10", "here", "layout ddim has no use for autoencoder"),
        ("dit", "cifar10", "here", "cifar10 has no layout dit; systems with it: imagenet-dit"),
    ],
)
def test_layout_system_and_autoencoder_fit(layout, system, autoencoder, message):
    """A DiT has no autoencoder in its checkpoint; every other layout brings its own, or has none."""
    tree = {"source": "checkpoint", "layout": layout, "path": "x", "system": system, "autoencoder": autoencoder}
    with pytest.raises((InputError, ValidationError), match=message):
        check_layout(CheckpointModel(**tree))
