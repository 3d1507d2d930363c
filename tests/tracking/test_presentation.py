"""What MLflow's pages show of a compression."""

import subprocess

import pytest

from stages.storage.files import write_json
from stages.tracking.presentation import describe, first_metrics, run_name, source_tags, without_folders

BLOCKS = {
    "seed": 0,
    "fetch": {"model": {"source": "bundled", "name": "digits"}},
    "importance": {"criterion": "diff-pruning"},
    "prune": {"target": {"ratio": 0.3}, "compensate": None},
    "rounds": {"count": 1, "steps": 50},
    "finetune": {"init": "pruned", "loss": {"noise": 0.0, "output": 1.0, "feature": 0.1}},
}
METRICS = {
    "evaluate.finetuned.fid": 0.414,
    "evaluate.dense.fid": 0.369,
    "evaluate.finetuned.ssim": 0.983,
    "evaluate.finetuned.macs": 36.0,
    "evaluate.dense.macs": 64.0,
    "costs.finetuned.speed_up": 1.2,
}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "digits · diff-pruning · ratio 0.3"),
        ({"prune": {"target": {"ratio": None, "macs": "56%"}}}, "digits · diff-pruning · MACs 56%"),
        ({"prune": {"target": {"latency_ms": 12.5}}}, "digits · diff-pruning · 12.5 ms"),
        ({"rounds": {"count": 3}}, "digits · diff-pruning · ratio 0.3 · 3 rounds"),
        ({"seed": 2}, "digits · diff-pruning · ratio 0.3 · seed 2"),
        (
            {"finetune": {"init": "scratch", "loss": {"noise": 1.0, "output": 0.0}}},
            "digits · diff-pruning · ratio 0.3 · scratch · noise loss",
        ),
        ({"fetch": {"model": {"source": "hub", "repo": "google/ddpm-cat"}}}, "ddpm-cat · diff-pruning · ratio 0.3"),
        ({"fetch": {"model": {"source": "folder", "path": "/home/me/cats/"}}}, "cats · diff-pruning · ratio 0.3"),
        (
            {"fetch": {"model": {"source": "registry", "uri": "models:/espalier-cats/3"}}},
            "cats · diff-pruning · ratio 0.3",
        ),
    ],
)
def test_a_run_is_named_by_model_criterion_and_budget(changes, name):
    """And by what is unusual: rounds, another recovery, another seed."""
    assert run_name({**BLOCKS, **changes}) == name


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/me/cats", "…/cats"),
        ("~/cats", "…/cats"),
        ("$MODELS/a/cats.pth", "…/cats.pth"),
        ("/data", "…/data"),
        ("data/cats", "data/cats"),
        ("google/ddpm-cat", "google/ddpm-cat"),
        ("s3://bucket/cats", "s3://bucket/cats"),
        (0.3, "0.3"),
        (["*"], "['*']"),
    ],
)
def test_params_keep_no_folder_of_this_machine(value, shown):
    """The last part of a path says what it is; names of the Hub and addresses stay."""
    assert without_folders(value) == shown


def test_the_metrics_that_matter_come_first_by_name():
    """MLflow sorts by name; the metrics that others read keep theirs."""
    found = first_metrics(METRICS)

    assert found == {"1 FID": 0.414, "3 SSIM": 0.983, "4 MACs share of dense": 36 / 64, "5 speed-up": 1.2}
    assert sorted([*METRICS, *found])[: len(found)] == list(found)
    assert first_metrics({}) == {}


def test_a_description_begins_with_the_verdict(tmp_path):
    """Before there is one, with the numbers beside those of the dense model; the table follows without its notes."""
    (tmp_path / "summary").mkdir()
    (tmp_path / "summary" / "results.md").write_text("| model |\n| --- |\n| dense |\n\nProtocol 0123456789ab\n")
    numbers = describe(METRICS, tmp_path)
    write_json(tmp_path / "summary" / "verdict.json", {"sentence": "Half the size."})
    judged = describe(METRICS, tmp_path)

    assert numbers == "FID 0.414 (dense 0.369), SSIM 0.983.\n\n| model |\n| --- |\n| dense |"
    assert judged == "**Half the size.**\n\n| model |\n| --- |\n| dense |"


@pytest.mark.parametrize(
    ("origin", "name"),
    [
        (
            "https://me:secret@example.org/me/espalier.git",  # pragma: allowlist secret
            "https://example.org/me/espalier.git",
        ),
        ("git@example.org:me/espalier.git", "git@example.org:me/espalier.git"),
        (None, "project"),
    ],
)
def test_the_source_is_the_repository_and_no_folder(tmp_path, monkeypatch, origin, name):
    """Also in a clone of a local repository, as each workspace is one; passwords are left out."""
    project, clone = tmp_path / "project", tmp_path / "clones" / "project"
    author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    commands = [["init", "-q", "-b", "main", str(project)]]
    commands += [["-C", str(project), "remote", "add", "origin", origin]] if origin else []
    commands += [["-C", str(project), *author, "commit", "-qm", "x", "--allow-empty"]]
    commands += [["clone", "-q", str(project), str(clone)]]
    for command in commands:
        subprocess.run(["git", *command], check=True)
    for folder in (project, clone):
        monkeypatch.chdir(folder)
        tags = source_tags()

        assert tags["mlflow.source.name"] == name
        assert tags.get("mlflow.source.git.repoURL") == (name if origin else None)
        assert (tags["mlflow.source.type"], tags["mlflow.project.entryPoint"]) == ("PROJECT", "dvc repro")
        assert (len(tags["mlflow.source.git.commit"]), tags["mlflow.source.git.branch"]) == (40, "main")
        assert str(tmp_path) not in str(tags)
