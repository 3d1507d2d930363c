"""The stages run where only the packages that compute are installed, as on a bare machine with a GPU."""

import ast
import os
import re
import subprocess
import sys

import pytest

from stages.runtime.code_hash import STAGES as FOLDER
from stages.runtime.code_hash import stage_files
from tests.records import STAGES

NEEDED = {
    "accelerate",
    "click",
    "diffusers",
    "huggingface_hub",
    "jinja2",
    "markupsafe",
    "matplotlib",
    "numpy",
    "pandas",
    "PIL",
    "psutil",
    "pydantic",
    "pydantic_core",
    "ruamel",
    "safetensors",
    "scipy",
    "skimage",
    "sklearn",
    "torch",
    "torch_fidelity",
    "torch_pruning",
    "torchvision",
    "tqdm",
}
"""All that the stages of dvc.yaml import as they start: torch, diffusers, torch-pruning, torch-fidelity, pydantic,
ruamel, what these bring along, and the usual scientific packages."""
ABSENT = (
    "boto3",
    "botocore",
    "datasets",
    "dvc",
    "fastapi",
    "grimp",
    "mlflow",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "prefect",
    "sqlalchemy",
)
"""What fetch from the Hub, the store, the record, graphs and the flows need, and the stages must do without."""
BLOCK = """
import sys
from importlib.machinery import PathFinder

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent!r} else super().find_spec(name, path, target)

sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
"""
"""Python that cannot import some packages from here on."""
RUN = """
import importlib, pathlib, shlex
from ruamel.yaml import YAML
from stages.runtime.code_hash import import_closure

for name, stage in YAML(typ="safe").load(pathlib.Path("dvc.yaml").read_text())["stages"].items():
    for module in sorted(import_closure(f"stages.{{name}}.__main__")):
        importlib.import_module(module)
    for command in stage["cmd"] if isinstance(stage["cmd"], list) else [stage["cmd"]]:
        main = importlib.import_module(f"stages.{{name}}.__main__").main
        main(shlex.split(command)[3:], standalone_mode=False)
    print("ran", name)
print("loaded", *(name for name in {absent!r} if name in sys.modules))
"""
TESTED_WITH = {"filelock", "pytest", "tests"}
"""What the tests of a GPU import besides."""
MARKED = ("test_device.py", "test_host_waits.py", "test_resume_on_a_gpu.py", "test_stages_on_a_gpu.py")
COLLECT = """
import pytest
sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]))
"""


def imported_at_start(file):
    """List the packages that a file of stages/ imports at its top, without those of Python and its own."""
    names, waiting = set(), [ast.parse(file.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
        elif not isinstance(node, ast.FunctionDef) and not (isinstance(node, ast.If) and "TYPE" in ast.dump(node.test)):
            waiting += ast.iter_child_nodes(node)
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"stages"}


def test_the_stages_start_with_these_packages_and_no_others():
    """MLflow, Prefect, DVC, boto3 and datasets are imported by the functions that use them."""
    files = {FOLDER / file for stage in STAGES for file in stage_files(stage) if file.endswith(".py")}

    assert set().union(*(imported_at_start(file) for file in files)) == NEEDED


@pytest.mark.e2e
def test_every_stage_runs_without_the_packages_of_the_record_and_the_flows(make_workspace):
    """All stages in one process that cannot import them; the record waits for a machine that has MLflow."""
    workspace = make_workspace("bare")
    result = workspace.run(sys.executable, "-c", (BLOCK + RUN).format(absent=ABSENT))

    assert result.returncode == 0, result.stdout + result.stderr
    assert [line.split()[1] for line in result.stdout.splitlines() if line.startswith("ran ")] == STAGES
    assert result.stdout.splitlines()[-1] == "loaded"
    assert "MLflow did not store the record (No module named 'mlflow')" in result.stderr
    assert list((workspace.path / "unsent").glob("*/record.json"))


def test_the_tests_of_a_gpu_start_with_the_same_packages(root):
    """So does what they share; a machine with a GPU may have no MLflow, Prefect, DVC or boto3."""
    tests = root / "tests"
    marked = [file for file in tests.rglob("test_*.py") if re.search(r"pytest\.mark\.gpu", file.read_text())]
    folders = {tests, *(file.parent for file in marked)}
    shared = [file for folder in folders for file in folder.glob("*.py") if not file.name.startswith("test_")]
    files = {*marked, *shared}

    assert set(MARKED) <= {file.name for file in marked}
    assert set().union(*(imported_at_start(file) for file in files)) <= NEEDED | TESTED_WITH


@pytest.mark.e2e
def test_the_tests_of_a_gpu_are_collected_without_the_other_packages(root):
    """In a process that can import neither them nor the plugins of pytest, which brings along only the marked tests."""
    absent = (*ABSENT, "hypothesis", "psycopg2", "pytest_timeout", "swift", "xdist")
    command = [sys.executable, "-c", (BLOCK + COLLECT).format(absent=absent)]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert [name for name in MARKED if f"/{name}::test_" not in done.stdout] == []
