"""A model of images that are wider than high goes through every stage."""

import base64
import io

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from mlflow.pyfunc.model import PythonModelContext
from PIL import Image

from benchmarks.systems import FEW
from flows.workspaces.overrides import apply
from stages.data.images import read_images
from stages.fetch.__main__ import main as fetch
from stages.models.pipeline import read_unet, write_pipeline
from stages.protocol.reference import read_reference
from stages.register.draw import Draw
from stages.storage.files import read_json, write_json
from tests.all_stages import run_all_stages

HEIGHT, WIDTH = 12, 16
DDIM = {"class": "DDIMScheduler", "config": {}, "steps": 2, "eta": 0.0, "takes": ["eta", "generator"], "guidance": None}


@pytest.mark.e2e
def test_a_non_square_model_goes_through_every_stage(tmp_path, root, make_unet, scheduler, monkeypatch):
    """Images are fitted to (height, width), and packed, drawn and compared in this shape."""
    write_pipeline(tmp_path / "model", make_unet(sample_size=(HEIGHT, WIDTH)), scheduler)
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 44), np.uint8)
    for index, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index:02}.png")
    local = {
        "fetch.model": {"source": "folder", "path": str(tmp_path / "model")},
        "fetch.data": {"source": "folder", "path": str(tmp_path / "images"), "fit": "crop", "resample": "box"},
        "reference.sampler.steps": 2,
    }
    (tmp_path / "params.yaml").write_bytes(apply({**FEW, **local}, root / "params.yaml"))
    monkeypatch.chdir(tmp_path)
    run_all_stages()
    images = read_images(tmp_path / "artifacts" / "data")
    evaluation = read_json(tmp_path / "reports" / "evaluate" / "evaluation.json")

    assert images.train.shape == (16, 1, HEIGHT, WIDTH)
    assert read_reference(tmp_path / "artifacts" / "reference").samples.shape[2:] == (1, HEIGHT, WIDTH)
    assert list(read_unet(tmp_path / "artifacts" / "finetuned").config["sample_size"]) == [HEIGHT, WIDTH]
    assert evaluation["models"]["finetuned"]["macs"] < evaluation["models"]["dense"]["macs"]
    assert drawn_size(tmp_path / "artifacts" / "released" / "finetuned", tmp_path) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("kind", ["vqvae", "vae"])
def test_non_square_images_become_non_square_latents(tmp_path, root, make_unet, scheduler, monkeypatch, kind):
    """Latents of (height, width) are those that the autoencoder makes of the packed images, neither turned nor cut."""
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 3}
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    torch.manual_seed(0)
    network = (AutoencoderKL if kind == "vae" else VQModel)(**blocks, **types, scaling_factor=0.5).eval()
    unet = make_unet(sample_size=(HEIGHT // 2, WIDTH // 2), in_channels=3, out_channels=3)
    write_pipeline(tmp_path / "model", unet, scheduler)
    network.save_pretrained(tmp_path / "model" / kind)
    (tmp_path / "images").mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (6, HEIGHT, WIDTH, 3), np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index}.png")
    local = {
        "fetch.model": {"source": "folder", "path": str(tmp_path / "model")},
        "fetch.data": {"source": "folder", "path": str(tmp_path / "images")},
        "fetch.heldout": 0.5,
    }
    (tmp_path / "params.yaml").write_bytes(apply({**FEW, **local}, root / "params.yaml"))
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(fetch, ["--model-out", "pretrained", "--data-out", "data"])
    assert result.exit_code == 0, (result.output, result.exception)
    images = read_images(tmp_path / "data")
    with torch.inference_mode():
        encoded = network.encode(torch.from_numpy(images.pixels.astype(np.float32)) / 127.5 - 1)
    expected = (encoded.latent_dist.mode() if kind == "vae" else encoded.latents) * 0.5

    assert images.pixels.shape == (3, 3, HEIGHT, WIDTH)
    assert images.train.shape == images.heldout.shape == (3, 3, HEIGHT // 2, WIDTH // 2)
    np.testing.assert_allclose(images.train.astype(np.float32), expected.numpy(), atol=2e-3)


def drawn_size(model, folder):
    """Width and height of an image that a registered version of the model draws."""
    write_json(
        folder / "sampler.json",
        {**DDIM, "latent_scale": None, "classes": None, "whole_timesteps": False, "without_class": None},
    )
    context = PythonModelContext({"model": str(model), "evidence": str(folder)}, {})
    version = Draw()
    version.load_context(context)
    (row,) = version.predict(context, pd.DataFrame({"seed": [1]}))
    return Image.open(io.BytesIO(base64.b64decode(row["png"]))).size
