"""The lineage that is read from a workspace."""

import subprocess
import sys

import pytest

from stages.register.lineage import read_lineage, read_workspace_lineage
from stages.runtime.errors import InputError
from stages.storage.files import folder_sha256, read_json, write_json
from stages.tracking.compression import Compression


def commit(folder):
    """Commit every file of a workspace."""
    for command in (("add", "."), ("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "all")):
        subprocess.run(["git", *command], cwd=folder, check=True)


@pytest.fixture
def compression(tmp_path, monkeypatch):
    """A committed workspace whose pipeline is up to date, with the run.json of every stage."""
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], check=True)
    (tmp_path / ".gitignore").write_text("artifacts\nreports\n")
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    (tmp_path / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    for name in ("params.yaml", "requirements.lock"):
        (tmp_path / name).write_text("")
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "code.py").write_text("")
    commit(tmp_path)
    made = Compression(tmp_path / "artifacts", tmp_path / "reports")
    for stage, folder in made.folders.items():
        write_json(folder / "run.json", {"stage": stage, "params": {}})
        write_json(made.code / f"{stage}.json", {"sha256": stage})
    write_json(tmp_path / "artifacts" / "data" / "dataset.json", {"sha256": "d" * 64})
    return made


def test_the_lineage_names_head_and_holds_runs_with_provenance(compression, tmp_path):
    """The provenance of a stage whose output came out of DVC's cache is null."""
    run_record = compression.folders["prune"] / "run.json"
    provenance = {"output_sha256": folder_sha256(run_record.parent), "device": {"name": "cpu"}}
    write_json(tmp_path / "artifacts" / "pruned.provenance.json", provenance)
    lineage = read_workspace_lineage(compression)

    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert lineage.git_commit == head.stdout.strip()
    assert lineage.runs["prune"] == {**read_json(run_record), "code_sha256": "prune", "provenance": provenance}
    assert lineage.runs["fetch"]["provenance"] is None


def test_a_lineage_with_control_characters_is_refused(compression, tmp_path):
    """Its paths, versions and devices are printed when a version is reproduced."""
    content = read_workspace_lineage(compression).model_dump(mode="json")
    write_json(tmp_path / "evidence" / "lineage.json", content)
    assert read_lineage(tmp_path / "evidence").model_dump(mode="json") == content

    write_json(
        tmp_path / "evidence" / "lineage.json", {**content, "outputs": {"a\nmodels:/x/1 is identical": "a" * 64}}
    )
    with pytest.raises(InputError, match="holds control characters") as caught:
        read_lineage(tmp_path / "evidence")
    assert "\n" not in caught.value.message


def test_code_that_is_not_committed_is_refused(compression, tmp_path):
    """The commit of a version would not hold the code that made it."""
    (tmp_path / "stages" / "code.py").write_text("changed = True\n")

    with pytest.raises(InputError, match=r"^stages/code\.py is not as in commit [0-9a-f]{12}; commit it"):
        read_workspace_lineage(compression)
