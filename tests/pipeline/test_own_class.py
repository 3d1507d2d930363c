"""A model whose class diffusers does not have goes through every stage, and is drawn by its version."""

import re
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from stages.models.pipeline import read_unet
from stages.models.trust import trusting
from stages.protocol.reference import read_reference
from stages.register import package
from stages.register.canary import check_canary, draw_expected
from stages.runtime.errors import InputError
from stages.storage.files import read_json
from stages.tools.__main__ import main as tools
from tests.all_stages import run_all_stages
from tests.own_class import LABELS, write_own
from tests.pipeline.test_class_labels import CHANGES
from tests.version_images import check_version

PARAMS = {
    **CHANGES,
    "seed": 0,
    "fetch": {**CHANGES["fetch"], "model": {"source": "folder", "path": "model", "trust": True}},
    "reference": {**CHANGES["reference"], "sampler": {"steps": 4}},
    "prune": {"target": {"ratio": 0.4}, "compensate": {"num_images": 4, "num_timesteps": 2, "rounds": 2}},
    "rounds": {"count": 2, "steps": 10},
    "costs": {"batches": [1], "repeats": 6, "seconds": 0.05},
}


@pytest.fixture
def project(tmp_path, root, monkeypatch):
    """A folder with the model of four classes, images and params, in which all stages have run."""
    monkeypatch.chdir(tmp_path)
    write_own(tmp_path / "model", config={"num_labels": 5}, description=LABELS)
    draws, labels = np.random.default_rng(0), np.arange(32) % 4
    pixels = draws.integers(0, 60, (32, 4, 4)).repeat(4, axis=1).repeat(4, axis=2) + 60 * labels[:, None, None]
    np.savez(tmp_path / "images.npz", arr_0=pixels.astype(np.uint8), labels=labels)
    tree = YAML(typ="safe").load((root / "params.yaml").read_text())
    for block, changes in PARAMS.items():
        tree[block] = {**tree[block], **changes} if isinstance(changes, dict) else changes
    tree["costs"] = PARAMS["costs"]
    YAML(typ="safe").dump(tree, tmp_path / "params.yaml")
    run_all_stages()
    return tmp_path


@pytest.mark.e2e
def test_an_own_class_goes_through_every_stage(project):
    """Two rounds, labels with one for no class, guidance, features; the release draws with diffusers alone."""
    with trusting(is_trusted=True):
        dense, finetuned = (read_unet(project / "artifacts" / name) for name in ("pretrained", "finetuned"))
    evaluation = read_json(project / "reports" / "evaluate" / "evaluation.json")
    released = project / "artifacts" / "released" / "finetuned"
    (code,) = re.findall(r"```python\n(.*?)```", (released / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code.replace("PATH/TO/THIS/FOLDER", str(released)), names)
    drawn = CliRunner().invoke(tools, ["draw", "--model", "artifacts/finetuned", "--out", "drawn"])
    trusted = CliRunner().invoke(tools, ["draw", "--model", "artifacts/finetuned", "--out", "drawn", "--trust"])

    assert evaluation["models"]["finetuned"]["macs"] < evaluation["models"]["dense"]["macs"]
    assert finetuned.attention.heads < dense.attention.heads == 4
    assert len(finetuned.attention.qkv.weight) == 3 * finetuned.attention.heads * 8
    assert finetuned.head.weight.shape[0] == dense.head.weight.shape[0] == 2
    assert names["images"].shape == (1, 1, 16, 16)
    assert "denoiser.py" in (released / "README.md").read_text()
    assert "fetch.model.trust" in drawn.output
    assert trusted.exit_code == 0, trusted.output
    check_version(released, read_reference(project / "artifacts" / "reference").protocol, project / "evidence", [3, 0])
    check_sandboxes(released, project)


def check_sandboxes(released, project):
    """A promotion draws with the version's code and Espalier's, each in a sandbox; outside its class does not run."""
    shutil.copytree(project / "reports" / "evaluate", project / "evidence" / "evaluation")
    shutil.copytree(released, project / "in" / "model")
    folders = {"model": project / "in" / "model", "evidence": project / "evidence"}
    package._save_mlflow_model(folders, project / "version")
    found = check_canary(project / "version", 1.0, [5, 6])

    assert "2 images from the seeds 5, 6" in found
    with pytest.raises(InputError, match="trust"):
        draw_expected(project / "version", [5])
