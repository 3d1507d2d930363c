"""The command draw: images of a model folder as PNG, each from its own seed."""

import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from ruamel.yaml import YAML

from stages.storage.files import folder_sha256
from stages.tools.__main__ import main


@pytest.fixture
def draw(root, tmp_path, model_folder, monkeypatch):
    """Draw with the tiny model in two steps: the result, and the images by name."""
    monkeypatch.chdir(tmp_path)
    tree = YAML(typ="safe").load((root / "params.yaml").read_text())
    tree["reference"]["sampler"] = {"steps": 2}
    YAML(typ="safe").dump(tree, tmp_path / "params.yaml")

    def run(out, *options, model=model_folder):
        result = CliRunner().invoke(main, ["draw", "--model", str(model), "--out", out, *map(str, options)])
        images = {path.name: np.asarray(Image.open(path)) for path in (tmp_path / out).glob("*.png")}
        return result, images

    return run


def test_each_seed_has_one_image_whatever_the_others_are(draw):
    """Names are seeds; a different number of images changes none of them."""
    result, three = draw("three", "--num-images", 3, "--seed", 7)
    _, one = draw("one", "--num-images", 1, "--seed", 8)

    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "Look at it: three/grid.png"
    assert set(three) == {"7.png", "8.png", "9.png", "grid.png"}
    assert three["7.png"].shape == (8, 8)
    np.testing.assert_allclose(three["8.png"].astype(int), one["8.png"].astype(int), atol=1)
    assert (three["7.png"] != three["8.png"]).any()


def test_the_images_are_those_of_the_sampler(draw, model_folder):
    """The reference: the same seeds drawn with the function that the stages use."""
    from stages.models.params import SamplerParams
    from stages.models.pipeline import read_scheduler, read_unet
    from stages.models.sampling import draw as draw_pixels

    _, images = draw("out", "--num-images", 2)
    unet, scheduler = read_unet(model_folder), read_scheduler(model_folder)
    expected = draw_pixels(unet, scheduler, [0, 1], SamplerParams(steps=2), batch_size=2, label="x")

    for seed in (0, 1):
        np.testing.assert_allclose(images[f"{seed}.png"].astype(int), expected[seed, 0].astype(int), atol=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label", 1], "the model is unconditional; leave --label out"),
        (["--params", "nowhere.yaml"], "nowhere.yaml: "),
    ],
)
def test_what_does_not_fit_is_one_line(draw, options, message):
    """Nothing is written."""
    result, images = draw("out", *options)

    assert result.exit_code == 1
    assert message in result.output
    assert images == {}


def test_files_of_others_are_not_replaced(draw, tmp_path):
    """A folder that no command wrote stays as it is."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    result, _ = draw("out")

    assert result.exit_code == 1
    assert (tmp_path / "out/mine.txt").read_text() == "mine"


def test_a_model_given_as_output_is_not_replaced(draw, model_folder, tmp_path):
    """A released model has the record of a stage, too, but not of this command, which replaces its own images."""
    shutil.copytree(model_folder, tmp_path / "released")
    (tmp_path / "released/run.json").write_text('{"stage": "finetune"}')
    before = folder_sha256(tmp_path / "released")
    result, _ = draw("released", "--num-images", 1)

    assert result.exit_code == 1
    assert "released was written by finetune; give draw another folder" in result.output
    assert folder_sha256(tmp_path / "released") == before
    assert draw("own", "--num-images", 1)[0].exit_code == 0
    assert set(draw("own", "--num-images", 1, "--seed", 5)[1]) == {"5.png", "grid.png"}


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_drawn(draw):
    """The images would be lost."""
    result, _ = draw("/proc/images", "--num-images", 1)

    assert result.exit_code == 1
    assert result.output.startswith("Error: cannot write /proc/images")
