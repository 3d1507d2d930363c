"""The command draw with a registered version: its files, and the sampler that it was measured with."""

import json

import pytest
from click.testing import CliRunner

from stages.register.registry import MODEL
from stages.tools.__main__ import main
from tests.register.conftest import NAME


@pytest.fixture
def draw(publish):
    """Register version 1 and draw 4 images with it: exit code and output."""
    publish()

    def run(out, *options, model=f"models:/{NAME}/1"):
        given = ["draw", "--model", model, "--out", out, "--num-images", "4", "--batch-size", "4", *options]
        result = CliRunner().invoke(main, given)
        return result.exit_code, result.output

    return run


def test_a_version_is_drawn_as_it_was_measured(draw, protocol, tmp_path):
    """Without params.yaml; an alias is the same job as the number, and PNG files are a folder as of any model."""
    code, output = draw("out", "--format", "parquet")
    assert code == 0, output
    job = json.loads((tmp_path / "out/manifest.json").read_text())["job"]
    assert job["model"] == f"models:/{NAME}/1"
    assert job["sampler"] == protocol.sampler.model_dump(mode="json")
    code, output = draw("out", "--format", "parquet", model=f"models:/{NAME}@challenger")
    assert code == 0, output
    assert "0 of them now" not in output
    assert "complete, see out/manifest.json" in output
    code, output = draw("files")
    assert code == 0, output
    assert {path.name for path in (tmp_path / "files").glob("*.png")} == {"grid.png", *(f"{n}.png" for n in range(4))}


def test_a_version_that_was_changed_is_refused(draw, registry, tmp_path):
    """Nothing is written."""
    source = registry.find(f"models:/{NAME}/1").source
    next((tmp_path / source / MODEL).rglob("*.safetensors")).write_bytes(b"other")
    code, output = draw("out", "--format", "parquet")

    assert code == 1
    (line,) = output.strip().splitlines()
    assert "safetensors" in line
    assert not (tmp_path / "out").exists()
