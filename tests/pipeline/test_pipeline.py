"""The whole pipeline, by DVC and by Prefect."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import PurePath
from random import Random

import pytest
from mlflow import MlflowClient
from ruamel.yaml import YAML

from tests.orchestra import until
from tests.records import STAGES

MODELS = ("dense", "pruned", "finetuned")
METRICS = {
    "params",
    "macs",
    "fid",
    "fid_interval",
    "fid_dense",
    "fid_dense_unpaired",
    "kid",
    "precision",
    "recall",
    "ssim",
    "mse",
}
TRAINING = {"steps": 60, "checkpoint_every": 5}
"""The training that is killed, resumed and compared; different from that of the finished workspace."""


def runs(workspace):
    """List the runs in the workspace's MLflow."""
    client = MlflowClient(f"sqlite:///{workspace.path}/mlflow.db")
    return client.search_runs([client.get_experiment_by_name("espalier").experiment_id])


@pytest.fixture(scope="module")
def project(copy_finished):
    """A copy of the finished workspace; tests leave it up to date with the params of that one."""
    return copy_finished("edited")


@pytest.fixture(scope="module")
def trained(copy_finished):
    """A copy in which finetune ran with other params without interruption, and the stages that these made stale."""
    workspace = copy_finished("trained")
    workspace.set("finetune", **TRAINING)
    found = stale(workspace)
    assert workspace.repro("finetune") == ["rounds", "finetune"]
    return workspace, found


def test_the_report_compares_the_three_models(finished):
    """Every metric of every model, and MACs fall by 40 to 60 %."""
    folder = finished.path / "reports/evaluate"
    metrics = {name: json.loads((folder / f"metrics/{name}.json").read_text()) for name in MODELS}
    protocol = json.loads((folder / "evaluation.json").read_text())["protocol"]
    costs = json.loads((finished.path / "reports/costs/metrics.json").read_text())

    assert all(set(metrics[model]) >= METRICS for model in MODELS)
    assert 0.4 < 1 - metrics["pruned"]["macs"] / metrics["dense"]["macs"] < 0.6
    assert len({metrics[model]["protocol"] for model in MODELS}) == 1
    assert (protocol["num_images"], protocol["sets"], protocol["seed"]) == (8, 2, 0)
    assert set(costs) == set(MODELS)


def test_every_run_folder_explains_itself(finished):
    """run.json in each output, its provenance beside it, and the kept channels in each pruned model."""
    for folder in ("pretrained", "data", "importance", "pruned", "finetuned", "reference"):
        record = json.loads((finished.path / "artifacts" / folder / "run.json").read_text())
        assert {"stage", "params", "python", "packages"} == set(record)
    provenance = json.loads((finished.path / "artifacts/finetuned.provenance.json").read_text())
    assert {"code_sha256", "git_commit", "device", "began_at", "seconds"} <= set(provenance)
    plans = [
        (finished.path / "artifacts" / folder / "pruning_plan.json").read_text() for folder in ("pruned", "finetuned")
    ]
    assert plans[0] == plans[1]


def test_nothing_is_pickled(finished, is_pickle):
    """Neither in the artifacts nor in DVC's cache nor in MLflow's store."""
    files = [
        path
        for folder in ("artifacts", ".dvc/cache", "mlruns", "reports")
        for path in finished.path.glob(f"{folder}/**/*")
        if path.is_file()
    ]

    assert len(files) > 30
    assert [path for path in files if is_pickle(path.read_bytes())] == []


def test_nobody_else_may_write_where_dvc_unpickles(finished):
    """DVC keeps its state, which holds pickles, in the project; by default it is below /var/tmp, open to every user."""
    repo = finished.path / ".dvc_state" / "repo"
    folders = [repo, *(path for path in repo.rglob("*") if path.is_dir())]

    assert {path.name for path in repo.rglob("*.db")} >= {"cache.db"}
    assert [path for path in folders if path.stat().st_mode & 0o022] == []


def test_one_pipeline_is_one_run(finished):
    """The stage report recorded it."""
    assert len(runs(finished)) == 1


def test_a_second_repro_runs_nothing(project):
    """Everything is up to date."""
    assert project.repro() == []
    assert not (project.path / "mlflow.db").exists()


@pytest.fixture
def edit(project):
    """Replace text in files of the project for one test, after which `dvc repro` restores every output."""
    before = {}

    def replace(name, old, new):
        file = project.path / name
        before.setdefault(file, file.read_text())
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new, 1))

    yield replace
    for file, text in before.items():
        file.write_text(text)
    assert project.repro() == []


def changed(project):
    """Read which stages DVC finds changed, and why."""
    status = project.run("dvc", "status", "--json")
    assert status.returncode == 0, status.stderr
    return json.loads(status.stdout)


def stale(project):
    """List the stages whose code or params changed, and those that follow them, in the order of dvc.yaml."""
    found, outputs = set(changed(project)), []
    stages = YAML(typ="safe").load((project.path / "dvc.yaml").read_text())["stages"]
    for name, stage in stages.items():
        deps = [PurePath(dep) for dep in stage["deps"]]
        if name in found or any(dep.is_relative_to(output) for dep in deps for output in outputs):
            outputs += stage["outs"]
            found.add(name)
    return [name for name in stages if name in found]


def test_edited_prose_runs_only_the_hash_of_the_code(project, edit):
    """Docstrings, comments and error messages, in packages that every stage runs and in a stage."""
    edit("stages/runtime/schema.py", '"""', '"""Another sentence. ')
    edit("stages/runtime/errors.py", "import re\n", "import re  # a comment\n")
    edit("stages/models/pipeline.py", "supported:", "allowed:")
    edit("stages/prune/surgery.py", '"""', '"""Another sentence. ')

    assert project.repro() == ["code"]


def test_edited_code_runs_its_stage_and_what_follows(project, edit):
    """An operator in stages/prune/ leaves everything that does not read the pruned model as it is."""
    edit("stages/prune/surgery.py", "    return pruned\n", "    return pruned or None\n")

    assert project.repro("code") == ["code"]
    assert stale(project) == ["prune", "rounds", "finetune", "evaluate", "variants", "costs", "report"]


@pytest.mark.e2e  # test_code_hash has the rule
def test_edited_types_of_fetch_run_fetch_alone(project, edit):
    """The other stages read their own blocks of params.yaml, and fetch's outputs stay the same."""
    edit("stages/fetch/params.py", "ge=0", "ge=1")

    assert project.repro("code") == ["code"]
    assert set(changed(project)) == {"fetch"}


@pytest.mark.e2e
def test_an_edited_template_runs_only_the_report(project, edit):
    """Cards and page are written again; no number is computed again."""
    edit("stages/report/card.md.j2", "\n", "\n\nA sentence.\n")
    before = (project.path / "reports/summary/results.md").read_text()

    assert project.repro() == ["code", "report"]
    assert "A sentence." in (project.path / "artifacts/released/finetuned/README.md").read_text()
    assert (project.path / "reports/summary/results.md").read_text() == before


@pytest.mark.e2e
def test_a_finetune_param_makes_finetune_and_what_follows_stale(trained):
    """The images of the dense model are not drawn again."""
    assert trained[1] == ["rounds", "finetune", "evaluate", "variants", "costs", "report"]


@pytest.mark.e2e
def test_a_param_set_back_restores_from_the_cache(trained, finished):
    """Nothing is computed or recorded again."""
    workspace, _ = trained
    expected, recorded = finished.weights(), (workspace.path / "mlflow.db").stat().st_mtime_ns
    workspace.set("finetune", steps=12, checkpoint_every=2)
    assert workspace.repro() == []
    assert workspace.weights() == expected

    workspace.set("finetune", **TRAINING)
    assert workspace.repro("finetune") == []
    assert workspace.weights() != expected
    assert (workspace.path / "mlflow.db").stat().st_mtime_ns == recorded


@pytest.mark.e2e
def test_a_killed_finetune_continues_from_its_last_checkpoint(trained, copy_finished):
    """After kill -9 of all, and a SIGTERM of DVC alone, `dvc repro` takes the steps left, to the same weights.

    DVC leaves its stage running; the stage ends by itself, and saves the step before.
    """
    killed = copy_finished("killed")
    killed.set("finetune", **TRAINING)
    checkpoints = killed.path / "checkpoints/finetune"
    killed.run_until(lambda: list(checkpoints.glob("*/step-0000001?.safetensors")), "dvc", "repro", "finetune")
    assert not (killed.path / "artifacts/finetuned").exists()
    said = killed.run_until(
        lambda: list(checkpoints.glob("*/step-0000002?.safetensors")),
        *("dvc", "repro", "finetune"),
        number=signal.SIGTERM,
        alone=True,
    )
    assert re.search(r"stopped by SIGTERM after step \d+, which is saved", said)

    result = killed.run("dvc", "repro", "finetune")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"from step \d+", result.stderr)
    assert killed.weights() == trained[0].weights() != {}
    assert list(checkpoints.glob("*")) == []


@pytest.mark.e2e
def test_dvc_computes_the_weights_of_the_flow(finished, make_workspace):
    """A new workspace with empty caches, run by `dvc repro`: bit-identical weights, one run in MLflow."""
    other = make_workspace("repro")
    assert other.repro() == STAGES

    assert set(other.weights()) == set(finished.weights())
    assert other.weights() == finished.weights() != {}
    assert len(runs(other)) == 1


@pytest.mark.e2e
def test_a_failed_stage_fails_the_flow_in_one_line(project):
    """The stage's message, exit code 1 and no traceback; with the old ratio every output is restored."""
    before = project.weights("artifacts")
    project.set("prune", target={"ratio": 0.99})
    result = project.run("python", "-m", "flows", "compress")
    project.set("prune", target={"ratio": 0.3})

    output = result.stdout + result.stderr
    assert result.returncode == 1
    assert "prune.target.ratio 0.99 leaves 0 of" in output
    assert "Traceback" not in output
    assert project.repro() == []
    assert project.weights("artifacts") == before


@pytest.mark.e2e
def test_a_killed_training_continues_on_another_machine(connect, trained, copy_finished, monkeypatch):
    """The second machine has neither checkpoints nor outputs, and ends with the weights of the uninterrupted run."""
    store = connect()
    monkeypatch.setenv("ESPALIER_STORE", store.uri)
    machines = [copy_finished("first"), copy_finished("second")]
    for machine in machines:
        machine.set("finetune", **TRAINING)
    machines[0].run_until(lambda: store.names("checkpoints/")[1:], "dvc", "repro", "finetune")
    result = machines[1].run("dvc", "repro", "finetune")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"from step \d+", result.stderr)
    assert machines[1].weights() == trained[0].weights() != {}


@pytest.mark.e2e  # test_checkout has the rule, this the two commands
def test_a_flow_waits_for_make_run(copy_finished):
    """Both succeed, and every stage ran once; the flow names the process that it waits for."""
    workspace = copy_finished("together")
    workspace.set("finetune", steps=14)
    command = ["python", "-m", "flows", "repro"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=workspace.path, env=workspace.environment(), **pipes) as first:
        assert until((workspace.path / ".dvc/tmp/rwlock").exists)
        result = workspace.run("python", "-m", "flows", "compress")
    said = result.stdout + result.stderr

    assert (first.returncode, result.returncode) == (0, 0), said
    assert f"waiting for another run that works in this checkout (process {first.pid}, " in said
    assert "Running stage" not in said


SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
NUM_MOMENTS = int(os.environ.get("ESPALIER_TEST_MOMENTS", "2"))
"""Moments of each signal and command; the long form has 20 and takes more than an hour."""
ENDS_IN_A_ROW = 5
"""Ends of one workspace before it may run undisturbed."""


def outputs(workspace):
    """Read from dvc.lock the hashes of all outputs that are the same in each run."""
    stages = YAML(typ="safe").load((workspace.path / "dvc.lock").read_text())["stages"]
    return {
        out["path"]: out["md5"]
        for name, stage in stages.items()
        for out in stage["outs"]
        if name not in ("costs", "report")
    }


@pytest.fixture(scope="module")
def undisturbed(copy_finished):
    """The hashes of a run that nothing disturbs, and its seconds."""
    workspace = copy_finished("undisturbed")
    workspace.set("finetune", **TRAINING)
    begin = time.monotonic()
    assert workspace.repro() == ["rounds", "finetune", "evaluate", "variants", "costs", "report"]
    return outputs(workspace), time.monotonic() - begin


@pytest.mark.e2e
@pytest.mark.timeout(NUM_MOMENTS * 600)
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("kind", ["dvc", "flow without a server", "flow with a server"])
def test_an_end_at_any_moment_leaves_nothing(undisturbed, copy_finished, prefect_server, kind, number):
    """No process is left, and a later run makes the outputs of an undisturbed one, with no step by hand.

    A workspace is ended up to five times in a row. DVC ignores a SIGINT while a stage runs, since Ctrl-C sends it to
    the stage, too; so here.
    """
    expected, seconds = undisturbed
    variables = prefect_server.client_environment() if kind == "flow with a server" else {}
    command = ("dvc", "repro") if kind == "dvc" else ("python", "-m", "flows", "compress")
    start_s, alone = 0 if kind == "dvc" else 10, kind != "dvc" or number != signal.SIGINT
    random, ended_in = Random(f"{kind} {number}"), Counter()
    for first in range(0, NUM_MOMENTS, ENDS_IN_A_ROW):
        workspace = copy_finished(f"moment-{first}")
        workspace.set("finetune", **TRAINING)
        for _ in range(first, min(first + ENDS_IN_A_ROW, NUM_MOMENTS)):
            at = time.monotonic() + random.uniform(0, (start_s + seconds) / 2)
            said = workspace.run_until(
                lambda at=at: time.monotonic() > at, *command, number=number, alone=alone, seconds=600, **variables
            )
            ended_in.update(re.findall(r"Running stage '(\w+)'", said)[-1:] or ["no stage"])
        result = workspace.run("python", "-m", "flows", "repro")
        assert result.returncode == 0, result.stdout + result.stderr
        assert outputs(workspace) == expected
        shutil.rmtree(workspace.path)
    print(f"{kind}, {number.name}: {dict(ended_in)}")
