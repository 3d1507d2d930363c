"""The command that removes what trainings and runs left behind."""

import os
import shutil
import time
from datetime import UTC, datetime

import pytest
import torch
from click.testing import CliRunner

from flows.__main__ import main
from flows.workspaces.leftovers import find_workspaces
from flows.workspaces.repository import HOME_VARIABLE, REPOSITORY_VARIABLE, Repository
from flows.workspaces.workspace import open_workspace
from stages.finetune.checkpoint import Checkpoint, Checkpoints
from stages.params import load_params
from stages.runtime.wording import format_bytes
from stages.tools.leftovers import Needed, measure
from tests.repository import make_repository

OLD_S = 30 * 24 * 3600
FOLDER = "checkpoints/finetune"


@pytest.fixture
def project(root, tmp_path, monkeypatch):
    """A project with one commit as the current folder."""
    path = tmp_path / "project"
    (path / ".dvc").mkdir(parents=True)
    for name in ("params.yaml", "dvc.yaml", ".gitignore", ".dvc/config"):
        shutil.copyfile(root / name, path / name)
    make_repository(path)
    for name in (HOME_VARIABLE, REPOSITORY_VARIABLE, "ESPALIER_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    monkeypatch.chdir(path)
    return path


def train(checkout, digit, steps):
    """Stop a training of so many steps after its first checkpoint."""
    params = load_params(checkout / "params.yaml")
    training = {"seed": params.seed, "finetune": {**params.finetune.model_dump(mode="json"), "steps": steps}}
    checkpoints = Checkpoints(checkout / FOLDER, digit * 64)
    with checkpoints.hold(training):
        checkpoints.save(Checkpoint(1, {"weight": torch.zeros(1000)}, [], []))
    return checkpoints.folder


def age(folder):
    """Make everything in a folder a month old."""
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (time.time() - OLD_S,) * 2, follow_symlinks=False)


def clean(*options):
    """Run the command: exit code and lines."""
    result = CliRunner().invoke(main, ["clean", *options])
    return result.exit_code, result.output.splitlines()


def test_nothing_is_removed_without_delete(project):
    """The table has one line each, the last line the totals; with --delete exactly these go."""
    other, current = train(project, "a", 7), train(project, "b", load_params(project / "params.yaml").finetune.steps)
    with open_workspace("HEAD", {"finetune.steps": 7}, print) as found:
        workspace = found.path
    train(workspace, "c", 7)
    for folder in (project / "checkpoints", workspace):
        age(folder)
    size, total = measure(other)[0], measure(other)[0] + measure(workspace)[0]
    code, lines = clean()
    assert code == 0
    assert [line.split()[0] for line in lines] == ["what", "checkpoints", "workspace", "2"]
    shown = format_bytes(size).split()
    assert lines[1].split()[1:] == [f"{FOLDER}/{'a' * 16}", *shown, "30", "d", "other", "params"]
    assert lines[-1] == f"2 to remove with --delete, {format_bytes(total)}; 1 stay of current params"
    assert all(path.is_dir() for path in (other, current, workspace))

    code, lines = clean("--delete")
    assert (code, lines[-1].split(";")[0]) == (0, f"2 removed, {format_bytes(total)}")
    assert [path.exists() for path in (other, current, workspace)] == [False, True, False]
    assert list(workspace.parent.iterdir()) == []
    assert clean()[1][-1].startswith("0 to remove")


@pytest.mark.usefixtures("project")
def test_a_workspace_stays_while_a_run_holds_it_or_may_go_on_from_it():
    """By its lock, by the lock of a training, by its age, and by checkpoints of the current params."""
    with open_workspace("HEAD", {"finetune.steps": 7}, print) as found:
        age(found.path)
        assert "1 stay in use" in clean("--delete")[1][-1]
    with Checkpoints(found.path / FOLDER, "a" * 64).hold({}):
        age(found.path)
        assert "1 stay in use" in clean("--delete")[1][-1]
    (found.path / "written").touch()
    assert "1 stay too young" in clean("--delete")[1][-1]
    age(found.path)
    assert clean("--delete")[1][-1].startswith("1 removed")

    with open_workspace("HEAD", {}, print) as found:
        pass
    train(found.path, "b", 1)
    age(found.path)
    assert "1 stay of current params" in clean("--delete")[1][-1]


@pytest.mark.usefixtures("project")
def test_remains_of_clones_and_removals_go_too():
    """They belong to the workspace of their name, and stay while it is held."""
    with open_workspace("HEAD", {"finetune.steps": 7}, print) as found:
        remains = [found.path.with_name(f".{found.path.name}.{end}") for end in ("gone", "x7f3")]
        for path in remains:
            path.mkdir()
            age(path)
        clean("--delete")
        assert all(path.is_dir() for path in remains)
    clean("--delete")

    assert [path.name for path in found.path.parent.iterdir()] == [found.path.name]


@pytest.mark.usefixtures("project")
def test_a_workspace_that_vanishes_before_its_removal_is_no_error():
    """A run that ended meanwhile has removed it."""
    with open_workspace("HEAD", {}, print) as found:
        workspace = found.path
    (leftover,) = find_workspaces(Repository.find(), Needed(frozenset(), datetime.now(UTC)))
    shutil.rmtree(workspace)

    assert leftover.remove()


@pytest.mark.usefixtures("project")
def test_the_store_is_cleaned_with_the_rest(connect, monkeypatch):
    """What it got today stays."""
    store = connect()
    store.client.put_object(Bucket=store.bucket, Key=store._object("a" * 64), Body=b"x")
    monkeypatch.setenv("ESPALIER_STORE", store.uri)

    assert clean("--delete") == (0, ["0 removed, 0 B; 1 stay too young"])


@pytest.mark.parametrize("text", ["7", "d", "23h", "0d", "-1d", "7 d", "1y", "99999d", "7d\n"])
@pytest.mark.usefixtures("project")
def test_another_age_is_refused(text):
    """In one line; an age below a day would take trainings on other machines for given up."""
    code, lines = clean("--older-than", text, "--delete")

    assert (code, len(lines)) == (1, 1)
    assert lines[0].endswith("give hours, days or weeks such as 36h, 7d or 2w, at least 1d")


def test_invalid_params_remove_nothing(project):
    """It is unknown what they need."""
    folder = train(project, "a", 7)
    age(folder)
    (project / "params.yaml").write_text("seed: 0\n")
    code, lines = clean("--delete")

    assert (code, len(lines), folder.is_dir()) == (1, 1, True)


def test_a_folder_without_a_project_is_refused(tmp_path, monkeypatch):
    """In one line, and no folder is made there."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")

    assert clean() == (1, ["Error: params.yaml: No such file or directory; correct the path to it"])
    assert list((tmp_path / "empty").iterdir()) == []
