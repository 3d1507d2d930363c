"""The whole pipeline, by DVC and by Prefect."""

import json
import re
import shutil

from mlflow import MlflowClient

MODELS = ("dense", "pruned", "finetuned")
METRICS = {"params", "macs", "fid", "fid_interval", "kid", "precision", "recall", "ssim", "mse", "latency_ms"}


def runs(workspace):
    """All runs in the workspace's MLflow."""
    client = MlflowClient(f"sqlite:///{workspace.path}/mlflow.db")
    return client.search_runs([client.get_experiment_by_name("espalier").experiment_id])


def test_the_report_compares_the_three_models(finished):
    """Every metric of every model, and MACs fall by 40 to 60 %."""
    folder = finished.path / "reports/evaluate"
    metrics = {name: json.loads((folder / f"metrics/{name}.json").read_text()) for name in MODELS}
    protocol = json.loads((folder / "evaluation.json").read_text())["protocol"]

    assert all(set(metrics[model]) >= METRICS for model in MODELS)
    assert 0.4 < 1 - metrics["pruned"]["macs"] / metrics["dense"]["macs"] < 0.6
    assert len({metrics[model]["protocol"] for model in MODELS}) == 1
    assert (protocol["num_images"], protocol["sets"], protocol["seed"]) == (8, 2, 0)


def test_every_run_folder_explains_itself(finished):
    """run.json beside each model, and the kept channels beside each pruned one."""
    for folder in ("pretrained", "data", "importance", "pruned", "finetuned"):
        assert (finished.path / "artifacts" / folder / "run.json").is_file()
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


def test_a_second_repro_runs_nothing(finished):
    """Everything is up to date, and MLflow has one run of it."""
    assert finished.repro() == []
    assert len(runs(finished)) == 1


def test_a_finetune_param_runs_finetune_and_what_follows(finished):
    """Going back restores from the cache, which computes nothing and records nothing twice."""
    finished.set("finetune", steps=13)
    assert finished.repro() == ["finetune", "evaluate", "report"]  # what the dense model drew is not drawn again
    assert len(runs(finished)) == 2

    finished.set("finetune", steps=12)
    assert finished.repro() == []
    assert len(runs(finished)) == 2


def test_a_word_on_the_page_measures_nothing_again(finished):
    """Cards and page are told anew; no number is."""
    file = finished.path / "stages/report/card.md.j2"
    before = file.read_text()
    file.write_text(before + "\nA word.\n")
    assert finished.repro() == ["report"]
    assert (finished.path / "artifacts/released/finetuned/README.md").read_text().endswith("A word.")

    file.write_text(before)
    assert finished.repro() == []


def test_a_line_in_prune_runs_prune_and_what_follows(finished):
    """Even a comment: the code that made a model is part of what the model is."""
    file = finished.path / "stages/prune/surgery.py"
    before = file.read_text()
    file.write_text(before + "# a line\n")
    assert finished.repro() == ["prune", "finetune", "evaluate", "report"]

    file.write_text(before)
    assert finished.repro() == []


def test_prefect_gives_the_same_weights_from_nothing(finished, make_workspace):
    """A second workspace with empty caches, run as a flow with no server: bit-identical weights, one run in MLflow."""
    other = make_workspace("flow")
    result = other.run("python", "-m", "flows", "compress")

    assert result.returncode == 0, result.stdout + result.stderr
    assert "Running stage 'finetune'" in result.stdout + result.stderr
    assert other.weights() == finished.weights() != {}
    assert len(runs(other)) == 1


def test_a_failed_stage_fails_the_flow_in_words(finished):
    """The stage's own line, the stage's name, exit code 1 and no traceback; with the old ratio, all comes back."""
    before = finished.weights("artifacts")
    finished.set("prune", target={"ratio": 0.99})
    result = finished.run("python", "-m", "flows", "compress")
    finished.set("prune", target={"ratio": 0.3})

    told = result.stdout + result.stderr
    assert result.returncode == 1
    assert "prune.target.ratio 0.99 leaves 0 of" in told
    assert "stage prune failed" in told
    assert "Traceback" not in told
    assert finished.repro() == []
    assert finished.weights("artifacts") == before


def test_a_killed_finetune_goes_on_from_its_last_checkpoint(finished, make_workspace):
    """After kill -9 in mid-training, dvc repro: the same weights as those of the undisturbed run, and fewer steps."""
    killed = make_workspace("killed")
    shutil.copytree(finished.path / ".dvc/cache", killed.path / ".dvc/cache")
    killed.set("finetune", steps=100, checkpoint_every=5)
    finished.set("finetune", steps=100, checkpoint_every=5)
    checkpoints = killed.path / "checkpoints/finetune"
    killed.run_until(lambda: list(checkpoints.glob("*/step-0000001?.safetensors")), "dvc", "repro", "finetune")
    assert not (killed.path / "artifacts/finetuned").exists()

    result = killed.run("dvc", "repro", "finetune")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"finetune goes on from step \d+", result.stderr)
    assert finished.run("dvc", "repro", "finetune").returncode == 0
    assert killed.weights() == finished.weights() != {}
    assert list(checkpoints.glob("*")) == []
    finished.set("finetune", steps=12, checkpoint_every=2)
    assert finished.repro() == []


def test_a_killed_training_goes_on_elsewhere_with_the_same_weights(connect, finished, make_workspace, monkeypatch):
    """Kill -9 on one machine; another has neither checkpoints nor outputs, and ends as the undisturbed run does."""
    store = connect()
    monkeypatch.setenv("ESPALIER_STORE", store.uri)
    settings = {"steps": 90, "checkpoint_every": 5}  # of no other test, or DVC would restore the result
    machines = [make_workspace("first"), make_workspace("second")]
    for machine in machines:
        shutil.copytree(finished.path / ".dvc/cache", machine.path / ".dvc/cache")
        machine.set("finetune", **settings)
    machines[0].run_until(lambda: store.names("checkpoints/")[1:], "dvc", "repro", "finetune")
    result = machines[1].run("dvc", "repro", "finetune")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "finetune goes on from step" in result.stderr

    monkeypatch.delenv("ESPALIER_STORE")
    finished.set("finetune", **settings)
    assert finished.run("dvc", "repro", "finetune").returncode == 0
    assert machines[1].weights() == finished.weights() != {}
    finished.set("finetune", steps=12, checkpoint_every=2)
    assert finished.repro() == []
