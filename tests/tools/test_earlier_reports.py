"""Reports of another commit, from DVC's cache."""

import shutil
import subprocess

import pytest

from stages.runtime.errors import InputError
from stages.tools.earlier_reports import FILES, fetch_reports
from tests.repository import commit, git
from tests.servers import own_environment
from tests.swift import BIN


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A repository whose first commit has reports in DVC's cache, and whose second has none."""
    folder = tmp_path_factory.mktemp("reports")

    for name in FILES:
        (folder / "reports" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "reports" / name).write_text(name)
    git(folder, "init", "-q")
    for command in (["init", "-q"], ["add", "-q", "reports/evaluate", "reports/costs"]):
        subprocess.run([BIN / "dvc", *command], cwd=folder, env=own_environment(), check=True, capture_output=True)
    commit(folder)
    git(folder, "tag", "with")
    git(folder, "rm", "-q", "reports/evaluate.dvc", "reports/costs.dvc")
    commit(folder)
    return folder


def test_the_reports_of_a_commit_are_those_of_its_hashes(project, tmp_path, monkeypatch):
    """Also where the folder holds none any more."""
    monkeypatch.chdir(project)
    shutil.rmtree(project / "reports", ignore_errors=True)
    fetch_reports("with", project / "reports", tmp_path)

    assert {name: (tmp_path / name).read_text() for name in FILES} == {name: name for name in FILES}


@pytest.mark.parametrize("name", ["HEAD", "nowhere"])
def test_a_commit_without_reports_is_refused(project, tmp_path, monkeypatch, name):
    """In one line, and nothing is written."""
    monkeypatch.chdir(project)
    with pytest.raises(
        InputError, match=rf"^the reports of {name} could not be read .*; give a commit whose dvc\.lock"
    ):
        fetch_reports(name, project / "reports", tmp_path)
    assert not list(tmp_path.iterdir())


def test_reports_that_no_cache_has_are_refused(project, tmp_path, monkeypatch):
    """As in a fresh clone before `dvc pull`."""
    clone = tmp_path / "clone"
    shutil.copytree(project, clone)
    shutil.rmtree(clone / ".dvc/cache")
    monkeypatch.chdir(clone)
    with pytest.raises(InputError, match=r"^the reports of with could not be read .* run `dvc push` where"):
        fetch_reports("with", clone / "reports", tmp_path / "out")
    assert not (tmp_path / "out").exists()
