"""A small DiT with classes, a learned variance and an autoencoder goes through every stage."""

import re

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image
from ruamel.yaml import YAML

from benchmarks import systems
from stages.data.images import read_images
from stages.fetch.convert_dit import DIT_NOISE
from stages.models.pipeline import read_unet, write_pipeline
from stages.protocol.reference import read_reference
from stages.storage.files import read_json, write_json
from tests.all_stages import run_all_stages
from tests.version_images import check_version

CHANGES = {
    "reference": {"sampler": {"scheduler": "DDPM", "spacing": "linspace", "steps": 4}, "guidance": 1.5},
    "prune": {"heads": "whole", "compensate": {"num_images": 4, "num_timesteps": 2, "rounds": 2}},
    "finetune": {"loss": {"noise": 1.0, "output": 1.0, "feature": 0.1, "jacobian": {"weight": 1e-4, "every": 2}}},
}


def add_autoencoder(model):
    """Write a small AutoencoderKL of three blocks beside a model."""
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8, 16), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    ).save_pretrained(model / "vae")  # fmt: skip
    index = read_json(model / "model_index.json")
    write_json(model / "model_index.json", {**index, "vae": ["diffusers", "AutoencoderKL"]})


@pytest.mark.e2e
@pytest.mark.parametrize(("scheduler", "is_latent"), [("DDPM", True), ("DDIM", False)])
def test_a_dit_goes_through_every_stage(tmp_path, make_dit, monkeypatch, scheduler, is_latent):
    """Labels with one for no class, guidance, all losses; DDPM takes the variance, DDIM the first half."""
    channels, size, patch = (4, 8, 2) if is_latent else (3, 16, 4)
    shape = {"in_channels": channels, "out_channels": 2 * channels, "sample_size": size, "patch_size": patch}
    model = make_dit(**shape, num_embeds_ada_norm=systems.CLASSES)
    write_pipeline(tmp_path / "model", model, DDPMScheduler.from_config(DIT_NOISE))
    if is_latent:
        add_autoencoder(tmp_path / "model")
    systems.make_data(systems.System("imagenet-ldm", (0, 0), (0, 0), 40), tmp_path / "pictures")
    systems.make_params("imagenet-ldm", tmp_path)
    yaml = YAML()
    params = yaml.load(tmp_path / "params.yaml")
    for block, changes in CHANGES.items():
        params[block].update(changes)
    params["reference"]["sampler"]["scheduler"] = scheduler
    if scheduler == "DDIM":
        params["reference"]["sampler"]["spacing"] = "trailing"
    yaml.dump(params, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    run_all_stages()
    images = read_images(tmp_path / "artifacts" / "data")
    reference = read_reference(tmp_path / "artifacts" / "reference")
    evaluation = read_json(tmp_path / "reports" / "evaluate" / "evaluation.json")
    released = tmp_path / "artifacts" / "released" / "finetuned"
    dense, finetuned = (read_unet(tmp_path / "artifacts" / name) for name in ("pretrained", "finetuned"))

    assert images.train.shape == (16, channels, size, size)
    assert images.conditions.table.tolist() == list(range(systems.CLASSES + 1))
    assert reference.samples.shape == ((1, 4, 3, 32, 32) if is_latent else (1, 4, 3, 16, 16))
    assert evaluation["models"]["finetuned"]["macs"] < evaluation["models"]["dense"]["macs"]
    assert {block.attn1.heads for block in finetuned.transformer_blocks} == {3}
    assert finetuned.transformer_blocks[0].attn1.to_q.weight.shape == (18, 24)
    assert finetuned.proj_out_2.weight.shape == dense.proj_out_2.weight.shape
    assert (released / "vae" / "config.json").is_file() == is_latent
    assert (released / "transformer" / "pruned_dit.py").is_file()
    assert read_json(released / "model_index.json")["_class_name"] == "DiTPipeline"
    check_plain_diffusers(released, is_latent=is_latent)
    check_version(released, reference.protocol, tmp_path / "evidence", [3, 9])


def check_plain_diffusers(released, *, is_latent):
    """The lines of the card draw an image with diffusers alone, or open a model that diffusers cannot draw with."""
    (code,) = re.findall(r"```python\n(.*?)```", (released / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code.replace("PATH/TO/THIS/FOLDER", str(released)), names)

    loaded = names["pipeline"].transformer if is_latent else names["model"]
    assert type(loaded).__name__ == "PrunedDiTTransformer2DModel"
    if is_latent:
        with Image.open("image.png") as image:
            assert image.size == (32, 32)
