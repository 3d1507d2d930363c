"""Models, images and the reference of the dense one: a project as small as stages that draw can have."""

import numpy as np
from click.testing import CliRunner
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from ruamel.yaml import YAML

from stages.data.images import Conditions, Images, label_table, write_images
from stages.models.pipeline import write_pipeline
from stages.reference.__main__ import main as reference
from tests.few_images import FEW_IMAGES
from tests.servers import ROOT


def make_small_project(folder, make_unet, classes=None):
    """Write models, images and params, and draw the reference; `classes` makes the models conditional."""
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
