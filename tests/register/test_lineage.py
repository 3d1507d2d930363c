"""The lineage that is read from a workspace."""

import subprocess
import sys

import pytest

from stages.register.lineage import read_lineage, read_workspace_lineage
from stages.runtime.errors import InputError
from stages.storage.files import folder_sha256, read_json, write_json
from stages.tracking.compression import Compression
from tests.repository import commit, git


@pytest.fixture
def compression(tmp_path, monkeypatch):
    """A committed workspace whose pipeline is up to date, with the run.json of every stage."""
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "-q")
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

    assert lineage.git_commit == git(tmp_path, "rev-parse", "HEAD")
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


def add_stage(folder, _monkeypatch):
    """Let the pipeline have a stage that never ran."""
    (folder / "dvc.yaml").write_text("stages: {new: {cmd: echo x > new, outs: [new]}}\n")
    commit(folder)


def remove_lock(folder, _monkeypatch):
    """Remove the list of packages."""
    (folder / "requirements.lock").unlink()
    commit(folder)


def go_down(folder, monkeypatch):
    """Run in a folder below the top."""
    monkeypatch.chdir(folder / "stages")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_stage, "the pipeline is not up to date, or `dvc status` failed; run the pipeline first"),
        (remove_lock, "requirements.lock is missing, and reproducing a version needs it; restore it"),
        (go_down, "this is not the top folder of a repository with a commit; commit first"),
    ],
)
def test_what_could_not_be_reproduced_is_refused(compression, tmp_path, monkeypatch, change, message):
    """A version is made of a committed project whose pipeline is up to date."""
    change(tmp_path, monkeypatch)

    with pytest.raises(InputError, match=message):
        read_workspace_lineage(compression)


def test_a_version_without_lineage_is_refused(tmp_path):
    """Nothing says what it was made of."""
    with pytest.raises(InputError, match=r"^the version has no lineage, .*; register it again$"):
        read_lineage(tmp_path)
