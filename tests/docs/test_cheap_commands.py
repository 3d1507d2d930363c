"""Commands of the pages that compute nothing: typed as they stand there, in a folder with the files of a clone.

tests/pipeline/test_how_tos.py types all commands of README and how-tos; this is what every run of the tests can afford.
"""

import shlex
import shutil
import subprocess

import pytest
from click.testing import CliRunner

from flows.__main__ import main
from tests.markdown import ROOT, blocks, commands, inline_commands
from tests.repository import commit, git

FILES = ("params.yaml", "dvc.yaml", "dvc.lock", "prefect.yaml", ".gitignore", ".dvc/config", ".dvc/.gitignore")
STATE = ".dvc_state/repo/.gitignore"
"""Makes the folder of DVC's state in every clone."""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone as the current folder, in which nothing has run."""
    project = tmp_path / "clone"
    for name in (*FILES, STATE):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, project / name)
    for name in ("recipes", "mlflow"):
        shutil.copytree(ROOT / name, project / name)
    git(project, "init", "-q")
    git(project, "add", "-f", STATE)
    commit(project)
    for name in ("ESPALIER_STORE", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    monkeypatch.setattr("stages.tools.planning.probe.SECONDS", 0.01)
    monkeypatch.chdir(project)
    return project


@pytest.mark.parametrize(
    ("page", "text", "shown"),
    [
        ("README.md", "espalier --help", "Tidy:"),
        ("README.md", "espalier doctor", "every value of params.yaml is allowed"),
        ("README.md", "espalier plan", "stages would run"),
        ("README.md", "espalier plan --preset cifar10 --tflops 40 --price 2.5", "at 2.5 an hour"),
        ("docs/flows.md", "espalier clean", "0 to remove with --delete"),
        ("docs/how-to/your-own-model.md", "espalier init --help", "--model"),
    ],
)
def test_a_command_that_computes_nothing_does_what_its_page_says(clone, page, text, shown):
    """It stands on the page as it is typed here, ends well, and changes no file that git sees."""
    words = [shlex.join(found) for block in blocks(page, "sh") for found in commands(block.text)]
    result = CliRunner().invoke(main, shlex.split(text)[1:])

    assert text in [*words, *inline_commands(page)]
    assert result.exit_code == 0, result.output
    assert shown in result.stdout
    assert subprocess.check_output(["git", "status", "--porcelain"], cwd=clone) == b""
