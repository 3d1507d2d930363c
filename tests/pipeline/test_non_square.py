"""A model of images that are wider than high goes through every stage."""

import shlex
from importlib import import_module

import numpy as np
from click.testing import CliRunner
from PIL import Image
from ruamel.yaml import YAML

from benchmarks.systems import FEW
from flows.workspaces.overrides import apply
from stages.data.images import read_images
from stages.models.pipeline import read_unet, write_pipeline
from stages.protocol.reference import read_reference
from stages.storage.files import read_json

HEIGHT, WIDTH = 12, 16


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
    for stage in YAML(typ="safe").load((root / "dvc.yaml").read_text())["stages"].values():
        for command in [stage["cmd"]] if isinstance(stage["cmd"], str) else stage["cmd"]:
            _, _, module, *arguments = shlex.split(command)
            result = CliRunner().invoke(import_module(f"{module}.__main__").main, arguments)
            assert result.exit_code == 0, (command, result.output, result.exception)
    images = read_images(tmp_path / "artifacts" / "data")
    evaluation = read_json(tmp_path / "reports" / "evaluate" / "evaluation.json")

    assert images.train.shape == (16, 1, HEIGHT, WIDTH)
    assert read_reference(tmp_path / "artifacts" / "reference").samples.shape[2:] == (1, HEIGHT, WIDTH)
    assert list(read_unet(tmp_path / "artifacts" / "finetuned").config["sample_size"]) == [HEIGHT, WIDTH]
    assert evaluation["models"]["finetuned"]["macs"] < evaluation["models"]["dense"]["macs"]
