"""The stage variants as a command."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from stages.protocol.variants import VARIANTS_FILE, VariantsRecord
from stages.variants import build
from stages.variants.__main__ import main
from tests.small_project import make_small_project


@pytest.fixture
def variants(make_once, make_unet, tmp_path, monkeypatch):
    """Run the stage on a small project, with blocks of params.yaml changed, or with other folders than its own."""
    project = make_once("small-project-None", lambda folder: make_small_project(folder, make_unet))
    monkeypatch.chdir(tmp_path)
    tree = YAML(typ="safe").load((project / "params.yaml").read_text())
    tree["variants"] = {"kinds": ["int8"], "models": ["pruned"]}
    folders = {"dense": "pretrained", "pruned": "pruned", "finetuned": "finetuned", "reference": "reference"}

    def run(changes=None, **others):
        YAML(typ="safe").dump(tree | (changes or {}), Path("params.yaml"))
        options = [f"--{name}={project / 'artifacts' / folder}" for name, folder in (folders | others).items()]
        return CliRunner().invoke(main, [*options, "--out=out", "--report=report"])

    return run


def test_variants_are_built_and_measured(variants):
    """Under the protocol of the reference, beside the model that they are made of."""
    result = variants()

    assert result.exit_code == 0, result.output
    record = VariantsRecord.model_validate_json((Path("report") / VARIANTS_FILE).read_text())
    (name,) = record.variants
    assert name == "pruned+int8"
    assert 0.9 < record.variants[name].ssim_to_model.mean < 1
    assert sorted(path.name for path in Path("report").iterdir() if path.is_dir()) == []


@pytest.mark.parametrize(
    ("changes", "folders", "message"),
    [
        (None, {"dense": "finetuned"}, "the dense model has weights of sha256"),
        ({"seed": 7}, {}, "protocol"),
        (None, {"reference": "nowhere"}, "nowhere"),
    ],
)
def test_a_wrong_reference_is_refused_before_a_variant_is_built(variants, monkeypatch, changes, folders, message):
    """Building a graph takes minutes; one line comes before, and no output stays."""
    built = []
    monkeypatch.setattr(build, "write_variant", lambda *arguments: built.append(arguments))
    result = variants(changes, **folders)

    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert built == []
    assert not Path("out").exists()
    assert not Path("report").exists()
