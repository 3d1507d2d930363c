"""A project with a tiny dense model, two smaller ones and the reference of the dense one; and the command on it."""

import shutil
import signal

import numpy as np
import pytest
from click.testing import CliRunner
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from ruamel.yaml import YAML

from stages.data.images import Conditions, Images, label_table, write_images
from stages.grid.__main__ import main
from stages.models.pipeline import write_pipeline
from stages.reference.__main__ import main as reference
from tests.few_images import FEW_IMAGES
from tests.servers import ROOT


@pytest.fixture
def write_project(tmp_path, make_once, make_unet, monkeypatch):
    """Copy models, images, params and the reference, which are made once; `classes` makes the models conditional."""

    def write(classes=None):
        made = make_once(f"grid-{classes}", lambda folder: _make_project(folder, make_unet, classes))
        shutil.copytree(made, tmp_path, dirs_exist_ok=True)
        monkeypatch.chdir(tmp_path)

    return write


def _make_project(folder, make_unet, classes):
    """Write models, images and params, and draw the reference."""
    config = {"sample_size": 16} | ({"num_class_embeds": classes + 1} if classes else {})
    for name, changes in {"pretrained": {}, "finetuned": {"seed": 1}, "pruned": {"seed": 2}}.items():
        write_pipeline(folder / "artifacts" / name, make_unet(**config, **changes), DDPMScheduler())
    pixels = np.random.default_rng(0).integers(0, 256, (24, 1, 16, 16)).astype(np.uint8)
    labels = np.arange(24) % (classes or 1)
    conditions = Conditions(label_table(classes, classes), labels[:16], labels[16:]) if classes else None
    (folder / "data").mkdir()
    write_images(folder / "data", Images(pixels[:16], pixels[16:], conditions), {})
    tree = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    tree["reference"] = {"sampler": {"steps": 4}, **FEW_IMAGES}
    YAML(typ="safe").dump(tree, folder / "params.yaml")
    options = {"params": "params.yaml", "model": "artifacts/pretrained", "data": "data", "out": "artifacts/reference"}
    words = [word for name, path in options.items() for word in (f"--{name}", str(folder / path))]
    result = CliRunner().invoke(reference, words)
    assert result.exit_code == 0, result.output


@pytest.fixture
def grid():
    """Run the command with options; its handlers of signals end with the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield lambda *options: CliRunner().invoke(main, [str(option) for option in options])
    for number, handler in before.items():
        signal.signal(number, handler)
