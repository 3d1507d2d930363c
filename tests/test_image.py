"""What the check of the image does before it runs the pipeline with small numbers, without an image."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

from stages.params import load_params
from stages.runtime.presets import PRESETS
from tests.small_numbers import SMALL


def test_the_check_of_the_image_puts_small_numbers_into_params(root, tmp_path):
    """With nothing but the clone, as in the container: none of this project's tests is on Python's path."""
    (code,) = re.findall(
        r"^\(cd tests && python -c '\n.*?^'\)$", (root / ".ci/image").read_text(), re.DOTALL | re.MULTILINE
    )
    shutil.copytree(root / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(root / "params.yaml", tmp_path)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["bash", "-euc", code], cwd=tmp_path, env={"PATH": path}, check=True)
    params = load_params(tmp_path / "params.yaml")

    assert params.finetune.steps == SMALL["finetune"]["steps"]
    assert params.reference.num_images == SMALL["reference"]["num_images"]


def test_the_presets_of_the_deployments_are_in_the_image(root):
    """`espalier deploy` in the container reads them."""
    deployments = YAML(typ="safe").load((root / "prefect.yaml").read_text())["deployments"]
    presets = {entry["parameters"]["preset"] for entry in deployments if "preset" in entry.get("parameters", {})}
    let_in = [line[1:] for line in (root / ".dockerignore").read_text().splitlines() if line.startswith("!")]

    assert presets
    assert PRESETS in let_in
    assert presets <= {path.stem for path in (root / PRESETS).glob("*.yaml")}
