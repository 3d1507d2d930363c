"""Flows in workspaces of their own, with no server: what they compute, what they share, what they leave."""

import json
import shutil
from collections import Counter

import pytest
from mlflow import MlflowClient

from tests.repository import commit

pytestmark = pytest.mark.e2e
ROWS = ["noise", "output"]


@pytest.fixture(scope="module")
def project(copy_finished):
    """A committed copy of the finished workspace with its cache."""
    return copy_finished("project", committed=True)


def runs(project):
    """List the compressions in the project's MLflow."""
    client = MlflowClient(f"sqlite:///{project.path}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("espalier").experiment_id])
    return [run for run in found if not run.info.run_name.startswith("sweep-")]


def ran(result):
    """List the stages that computed."""
    lines = (result.stdout + result.stderr).splitlines()
    return [line.split("Running stage '")[1].split("'")[0] for line in lines if "Running stage '" in line]


def test_overrides_run_beside_the_checkout(project, copy_finished):
    """The checkout stays as it is, unchanged stages come from the cache, and the weights are those of `dvc repro`."""
    before = project.run("git", "status", "--porcelain").stdout
    result = project.run("python", "-m", "flows", "compress", "--set", "finetune.steps=11")  # in no cache yet
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert ran(result) == ["rounds", "finetune", "evaluate", "variants", "costs", "report"]
    assert project.run("git", "status", "--porcelain").stdout == before
    assert list((project.path / ".espalier" / "workspaces").iterdir()) == []
    (run,) = runs(project)
    assert run.data.params["finetune.steps"] == "11"
    client = MlflowClient(f"sqlite:///{project.path}/mlflow.db")
    assert client.list_artifacts(run.info.run_id, "reports/evaluate")  # not in the folder that was removed

    other = copy_finished("other")
    other.set("finetune", steps=11)
    assert other.run("dvc", "repro", "finetune").returncode == 0
    project.set("finetune", steps=11)
    restored = project.run("dvc", "repro", "finetune")
    project.set("finetune", steps=12)
    assert "Running stage" not in restored.stdout
    assert project.weights() == other.weights() != {}
    assert project.run("dvc", "repro").returncode == 0


def test_a_sweep_loses_nothing_by_a_cell_that_fails(project):
    """The others finish and are compared; started again, it repeats nothing finished."""
    command = ["python", "-m", "flows", "sweep", "--grid", "prune.target.ratio=0.2,0.3,0.99", "--best", "1"]
    result = project.run(*command)
    said = result.stdout + result.stderr
    assert result.returncode == 1, said
    assert "Traceback" not in said
    assert "2 of 3 cells finished" in said
    assert "ratio 0.99 failed: stage prune failed: prune.target.ratio 0.99 leaves 0 of" in said
    assert "is models:/espalier-digits/1" in said
    assert {"fetch", "reference", "importance"} & set(ran(result)) == set()
    assert sorted(ran(result)) == ["costs", "evaluate", "finetune", "prune", "prune", "report", "rounds", "variants"]
    (folder,) = (project.path / ".espalier" / "sweeps").glob("*/result")
    found = json.loads((folder / "sweep_table.json").read_text())
    assert [row[0] for row in found["rows"]] == ["0.3", "0.2"]  # the cheaper first
    assert (folder / "pareto.png").read_bytes().startswith(b"\x89PNG")

    count = len(runs(project))
    again = project.run(*command)
    assert "3 cells, 2 of them finished before" in again.stdout + again.stderr
    assert ran(again) == ["prune"]
    assert len(runs(project)) == count


def test_a_curve_is_made_of_one_training_a_cell(project):
    """Two recipes with two seeds begin with one pruned model a seed."""
    preset = project.path / "recipes" / "presets" / "small.yaml"
    preset.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(project.path / "params.yaml", preset)
    commit(project.path)
    command = ["python", "-m", "flows", "compare", "--curve", "--preset", "small", "--seeds", "0,1"]
    command += ["--rows", "noise,output", "--steps", "2,5,12"]
    result = project.run(*command)
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert "Traceback" not in said
    assert "4 of 4 cells finished" in said
    counts = Counter(ran(result))
    assert (counts["prune"], counts["finetune"], counts["evaluate"]) == (
        1,
        4,
        4,
    )  # the pruned model of seed 0 is cached
    (folder,) = (project.path / ".espalier" / "curves").glob("*/result")
    found = json.loads((folder / "curve_table.json").read_text())
    assert {row: set(curve) for row, curve in found["curves"].items()} == {row: {"2", "5", "12"} for row in ROWS}
    seconds = [found["curves"]["noise"][step]["seconds"]["mean"] for step in ("2", "5", "12")]
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    assert len((folder / "table.csv").read_text().splitlines()) == 1 + 2 * 2 * 3
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")

    again = project.run(*command)
    assert again.returncode == 0, again.stdout + again.stderr
    assert ran(again) == []


def test_a_refused_run_leaves_every_output(copy_finished):
    """The plan's refusal ends `espalier run` with exit code 1 before DVC runs a stage and removes its outputs."""
    workspace = copy_finished("refused")
    workspace.set("prune", target={"ratio": 0.99})
    workspace.set("finetune", steps=13)
    before = workspace.weights("artifacts")
    result = workspace.run("python", "-m", "flows", "run")

    assert result.returncode == 1
    assert "prune.target.ratio 0.99 leaves 0 of" in result.stderr.splitlines()[-1]
    assert "Running stage" not in result.stdout + result.stderr
    assert workspace.weights("artifacts") == before
