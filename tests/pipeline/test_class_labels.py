"""A class-conditional UNet with learned variance, scale and shift through the stages."""

import numpy as np
import pytest
from click.testing import CliRunner
from diffusers import DDPMScheduler
from PIL import Image
from ruamel.yaml import YAML

from stages.evaluate.__main__ import main as evaluate
from stages.fetch.__main__ import main as fetch
from stages.finetune.__main__ import main as finetune
from stages.importance.__main__ import main as importance
from stages.models.layout import CLASS_EMBEDDING
from stages.models.pipeline import read_scheduler, read_unet, write_pipeline
from stages.models.sampling import SamplingContext, draw
from stages.protocol.reference import read_reference
from stages.prune.__main__ import main as prune
from stages.reference.__main__ import main as reference
from stages.storage.files import read_json, write_json
from stages.tools.__main__ import main as tools
from tests.few_images import FEW_IMAGES

NUM_CLASSES = 4
CHANGES = {
    "fetch": {
        "model": {"source": "folder", "path": "model"},
        "data": {"source": "npz", "path": "images.npz", "labels": "labels"},
        "heldout": 0.25,
    },
    "reference": {
        "sampler": {"scheduler": "DDPM", "spacing": "linspace", "steps": 4},
        "guidance": 2.0,
        **FEW_IMAGES,
    },
    "importance": {"num_images": 4, "stride": 250, "report": None},
    "finetune": {
        "steps": 40,
        "batch_size": 8,
        "loss": {"noise": 1.0, "output": 1.0, "feature": 0.1, "jacobian": {"weight": 0.1, "every": 10}},
        "ema_decays": [0.5],
        "label_dropout": 0.1,
        "heldout_images": 8,
        "heldout_every": 20,
        "checkpoint_every": 20,
        "samples": {"every": 40, "num_images": 2, "steps": 4},
    },
}
STAGES = {
    fetch: "--model-out dense --data-out data",
    reference: "--model dense --data data --out reference",
    importance: "--model dense --data data --out importance --report reports/importance",
    prune: "--model dense --importance importance --data data --out pruned",
    finetune: "--model pruned --teacher dense --data data --checkpoints checkpoints --out finetuned "
    "--report reports/finetune",
    evaluate: "--dense dense --pruned pruned --finetuned finetuned --reference reference --report reports/evaluate",
}
"""Stage -> its folders, in order."""


@pytest.fixture
def project(tmp_path, root, make_unet, monkeypatch):
    """A folder with a model, images of four classes and params; returns it and a function that runs a command."""
    monkeypatch.chdir(tmp_path)
    config = {"num_class_embeds": NUM_CLASSES + 1, "out_channels": 2, "resnet_time_scale_shift": "scale_shift"}
    unet = make_unet(sample_size=16, downsample_type="resnet", upsample_type="resnet", **config)
    write_pipeline(tmp_path / "model", unet, DDPMScheduler(variance_type="learned_range"))
    write_json(
        tmp_path / "model" / CLASS_EMBEDDING / "config.json",
        {"num_classes": NUM_CLASSES, "unconditional": NUM_CLASSES},
    )
    draws = np.random.default_rng(0)
    labels = np.arange(32) % NUM_CLASSES
    pixels = draws.integers(0, 60, (32, 4, 4)).repeat(4, axis=1).repeat(4, axis=2) + 60 * labels[:, None, None]
    np.savez(tmp_path / "images.npz", arr_0=pixels.astype(np.uint8), labels=labels)
    params = YAML(typ="safe").load((root / "params.yaml").read_text())
    for block, changes in CHANGES.items():
        params[block] |= changes
    params["prune"]["compensate"] = {"num_images": 4, "num_timesteps": 2}
    YAML().dump(params, tmp_path / "params.yaml")
    return tmp_path, lambda main, options: CliRunner().invoke(main, options.split())


@pytest.mark.e2e
def test_it_goes_through_every_stage(project):
    """Labels, variance and the empty class reach every stage and every released folder."""
    folder, run = project
    for main, options in STAGES.items():
        result = run(main, options)
        assert result.exit_code == 0, result.output
    evaluation = read_json(folder / "reports/evaluate/evaluation.json")
    curve = np.genfromtxt(folder / "reports/finetune/curve.csv", delimiter=",", names=True)
    found = read_reference(folder / "reference")
    context = SamplingContext(table=found.table, guidance=2.0)

    assert found.table.tolist() == list(range(NUM_CLASSES + 1))
    assert sorted(context.labels(found.protocol.seed, 8)) == sorted([*range(NUM_CLASSES)] * 2)
    assert found.samples.std() > 1
    assert evaluation["models"]["finetuned"]["macs"] < evaluation["models"]["dense"]["macs"]
    assert all(np.isfinite(model["fid"]["mean"]) for model in evaluation["models"].values())
    assert [change["name"] for change in evaluation["models"]["finetuned"]["classes"]] == [
        f"class {number}" for number in range(NUM_CLASSES)
    ]
    assert curve["heldout_loss"][-1] < 0.8 * curve["heldout_loss"][0]
    for name in ("dense", "pruned", "finetuned"):
        assert read_json(folder / name / CLASS_EMBEDDING / "config.json")["unconditional"] == NUM_CLASSES
        assert read_json(folder / name / "scheduler/scheduler_config.json")["variance_type"] == "learned_range"
    assert read_unet(folder / "finetuned").config["num_class_embeds"] == NUM_CLASSES + 1
    result = run(tools, "draw --model finetuned --out drawn --num-images 2 --seed 3 --label 1")
    assert result.exit_code == 0, result.output
    unet, scheduler = read_unet(folder / "finetuned"), read_scheduler(folder / "finetuned")
    sampler = found.protocol.sampler
    expected = draw(unet, scheduler, [3, 4], sampler, batch_size=2, label="", context=context, labels=[1, 1])
    for seed, image in zip((3, 4), expected, strict=True):
        assert np.abs(np.asarray(Image.open(folder / f"drawn/{seed}.png")).astype(int) - image[0]).max() <= 1
    result = run(tools, "draw --model finetuned --out others --label 4")
    assert (result.exit_code, "the model has 4 classes; give 0 to 3" in result.output) == (1, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "has no classes, but the model has 4; set fetch.data.labels"),
        ({"labels": "many"}, "has an image of class 7; the model has classes 0 to 3"),
    ],
)
def test_images_without_fitting_classes_are_refused(project, change, message):
    """By fetch, in one line."""
    folder, run = project
    with np.load(folder / "images.npz") as arrays:
        np.savez(folder / "images.npz", **arrays, many=np.arange(32) % 8)
    params = YAML(typ="safe").load((folder / "params.yaml").read_text())
    params["fetch"]["data"] |= change
    YAML().dump(params, folder / "params.yaml")
    result = run(fetch, STAGES[fetch])

    assert result.exit_code == 1
    assert message in result.output
    assert not (folder / "data").exists()
