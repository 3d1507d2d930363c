"""The folders that recipes write, which are none of the pipeline."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from recipes import dit_digits, mnist, photos

BESIDE = "choose a folder beside those of the pipeline"


@pytest.mark.parametrize(
    ("command", "args"),
    [
        (dit_digits.main, ["--out", "artifacts/pruned"]),
        (dit_digits.main, ["--out", "artifacts"]),
        (mnist.main, ["--npz", "mnist.npz", "--model-out", "artifacts/pruned", "--data-out", "images"]),
        (photos.main, ["--images", "photographs", "--data-out", "artifacts/pretrained/unet", "--model-out", "model"]),
    ],
)
def test_an_output_of_a_stage_is_refused(command, args, monkeypatch):
    """So are a folder that holds one, and a folder inside of one."""
    monkeypatch.chdir(Path(__file__).parents[2])

    result = CliRunner().invoke(command, args)

    assert result.exit_code == 1
    assert BESIDE in result.output


def test_the_folder_of_the_pictures_is_none_of_a_stage_either(monkeypatch, tmp_path):
    """The recipe of the DiT writes it beside the model's."""
    (tmp_path / "dvc.yaml").write_text("stages: {paint: {cmd: paint, outs: [model-images]}}\n")
    monkeypatch.chdir(tmp_path)

    result = CliRunner().invoke(dit_digits.main, ["--out", "model"])

    assert result.exit_code == 1
    assert BESIDE in result.output


def test_a_recipe_replaces_its_own_images_and_model(monkeypatch, tmp_path, images):
    """So that a training that was stopped goes on."""
    npz, trained = tmp_path / "mnist.npz", []
    npz.touch()
    monkeypatch.setattr(mnist, "read_mnist", lambda _: images)
    monkeypatch.setattr(mnist, "train_unet", lambda *_, out, **__: trained.append(out))
    for _ in range(2):
        args = ["--npz", npz, "--model-out", tmp_path / "model", "--data-out", tmp_path / "images"]
        result = CliRunner().invoke(mnist.main, [*map(str, args)])
        assert result.exit_code == 0, result.output
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model/run.json").write_text('{"stage": "finetune"}')
    assert trained == [tmp_path / "model"] * 2
