"""A finished compression as a version: registered once, promoted, loaded by its alias, and reproduced."""

import base64
import io
import json
import subprocess
from contextlib import contextmanager

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from PIL import Image
from ruamel.yaml import YAML

from stages.register.__main__ import main

NAME = "espalier-digits"


@pytest.fixture(scope="module")
def registered(copy_finished, lenient):
    """A committed copy of the finished workspace, and the result of registering it."""
    workspace = copy_finished("registered", committed=True)
    YAML().dump(lenient, workspace.path / "lenient.yaml")
    return workspace, workspace.run("python", "-m", "stages.register")


@pytest.fixture
def register(registered, monkeypatch):
    """Register the workspace's compression in this process, with its variables: the result."""
    workspace, _ = registered
    monkeypatch.chdir(workspace.path)
    for name, value in workspace.environment().items():
        monkeypatch.setenv(name, value)
    return lambda: CliRunner().invoke(main)


def client(workspace):
    """Return a client of the workspace's MLflow."""
    return MlflowClient(f"sqlite:///{workspace.path}/mlflow.db")


def test_a_compression_is_registered_once(registered, register):
    """It is the challenger and has its lineage; a second call finds it."""
    workspace, first = registered
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.startswith(f"models:/{NAME}/1 registered;")

    second = register()
    assert second.stdout.startswith(f"models:/{NAME}/1 ")
    (version,) = client(workspace).search_model_versions(f"name = '{NAME}'")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=workspace.path, capture_output=True, text=True, check=True)
    assert version.tags["espalier.commit"] == head.stdout.strip()
    assert "sets of 8 images" in version.description
    assert client(workspace).get_model_version_by_alias(NAME, "challenger").version == version.version


@contextmanager
def restored(path):
    """Yield the text of a file of the workspace, which other tests read, too, and write it again in the end."""
    before = path.read_text()
    try:
        yield before
    finally:
        path.write_text(before)


def test_code_that_is_not_committed_is_not_registered(registered, register):
    """The commit in the lineage would not hold the code that ran."""
    workspace, _ = registered
    path = workspace.path / "stages" / "runtime" / "seeds.py"
    with restored(path) as before:
        path.write_text(before + "# a change\n")
        result = register()

    assert result.exit_code == 1
    assert "stages/runtime/seeds.py is not as in commit" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_pipeline_that_is_not_up_to_date_is_not_registered(registered, register):
    """params.yaml differs from the params of the outputs."""
    workspace, _ = registered
    with restored(workspace.path / "params.yaml"):
        workspace.set("finetune", steps=13)
        result = register()

    assert result.exit_code == 1
    assert "the pipeline is not up to date" in result.stderr


@pytest.mark.e2e  # test_gate and test_promotion have every rule of it, and test_end_to_end the way of a user
def test_the_champion_draws_from_seeds(registered):
    """The promoted version, loaded by its alias, returns PNGs of the model's size."""
    workspace, _ = registered
    promoted = workspace.run("python", "-m", "flows", "promote", NAME, "--policy", "lenient.yaml")
    assert promoted.returncode == 0, promoted.stdout + promoted.stderr
    code = (
        f"import mlflow, json; m = mlflow.pyfunc.load_model('models:/{NAME}@champion');"
        "print(json.dumps(m.predict({'seed': [3, 4]})))"
    )
    drawn = json.loads(workspace.run("python", "-c", code).stdout)

    assert [row["seed"] for row in drawn] == [3, 4]
    assert [Image.open(io.BytesIO(base64.b64decode(row["png"]))).size for row in drawn] == [(16, 16)] * 2


@pytest.mark.e2e  # the pipeline once more
def test_a_version_is_reproduced(registered):
    """A run from its commit, params and data without caches gives the same hashes, and the version is tagged."""
    workspace, _ = registered
    result = workspace.run("python", "-m", "flows", "reproduce", f"models:/{NAME}/1")

    assert result.returncode == 0, result.stdout + result.stderr
    assert f"models:/{NAME}/1 is identical: " in result.stdout
    version = client(workspace).get_model_version(NAME, "1")
    assert version.tags["espalier.reproduced"] == "identical"
    record = json.loads(version.tags["espalier.reproduction"])
    assert (record["files"], record["machine"]) == ([], [])
    assert record["num_files"] > 10
    (run,) = client(workspace).search_runs([client(workspace).get_experiment_by_name("espalier").experiment_id])
    assert run.info.status == "FINISHED"
