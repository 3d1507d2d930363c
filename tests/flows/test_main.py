"""python -m flows with bad input: one line at once, before any server is started; --help imports nothing heavy."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from flows.__main__ import main
from tests.orchestra import bare_environment
from tests.servers import ROOT

HEAVY = ["datasets", "diffusers", "dvc", "matplotlib", "mlflow", "prefect", "torch", "torchvision"]
GRID = ["sweep", "--grid", "seed=1"]
COMPARE = ["compare", "--preset", "digits"]
QUICK_S = 20
"""A Prefect server alone takes about as long to start; what is measured here takes one second on a quiet machine."""
HELP = """
import sys
from click.testing import CliRunner
from flows.__main__ import main

for words in ([], *([name] for name in main.commands)):
    result = CliRunner().invoke(main, [*words, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage: " in result.output
print(*(name for name in HEAVY if name in sys.modules))
"""


@pytest.fixture
def project(tmp_path):
    """A small project with one commit."""
    path = tmp_path / "project"
    (path / ".dvc").mkdir(parents=True)
    (path / "recipes" / "presets").mkdir(parents=True)
    for name in ("params.yaml", "dvc.yaml", "prefect.yaml", ".dvc/config", "recipes/presets/digits.yaml"):
        shutil.copyfile(ROOT / name, path / name)
    author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=path, check=True)
    return path


def files(project):
    """What lies in a project, but for git's and our own; of ours there is no workspace."""
    assert not (project / ".espalier" / "workspaces").exists()
    found = (path for path in project.rglob("*") if not {".git", ".espalier"} & set(path.parts))
    return {path: path.read_bytes() for path in found if path.is_file()}


@pytest.fixture
def refused(project, tmp_path):
    """Ask for what cannot be: what was said. It is quick, starts no server, and leaves everything as it was."""

    def ask(*arguments, cwd=project, code=1):
        before = files(project)
        repository = tmp_path / "prefect"
        begin = time.monotonic()
        result = subprocess.run(
            [sys.executable, "-m", "flows", *arguments],
            cwd=cwd,
            env=bare_environment(PREFECT_HOME=str(repository), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.stdout == ""
        assert result.returncode == code, result.stderr
        assert not list(repository.glob("*.db"))
        assert time.monotonic() - begin < QUICK_S
        assert files(project) == before
        return result.stderr

    return ask


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compress", "--set", "prune.tarjet.macs=56%"], "prune.tarjet is not a known key"),
        (["compress", "--set", "finetune.steps=many"], "finetune.steps is 'many'"),
        (["compress", "--set", "finetune.steps=0"], "finetune.steps is 0"),
        (["compress", "--set", "finetune.steps"], "--set finetune.steps is not KEY=VALUE; write for example --set "),
        (["compress", "--set", "seed=1", "--set", "seed=2"], "--set seed stands twice"),
        (["compress", "--set", "seed=[1"], "is not valid YAML"),
        (["compress", "--limit", "finetune"], "--limit finetune is not KEY=VALUE; write for example --limit "),
        (["compress", "--limit", "finetune=soon"], "finetune=soon is no number of minutes above 0"),
        (["compress", "--limit", "finetune=0"], "finetune=0 is no number of minutes above 0"),
        (["compress", "--limit", "finetune=-3"], "finetune=-3 is no number of minutes above 0"),
        (["compress", "--limit", "finetune=true"], "finetune=True is no number of minutes above 0"),
        (["compress", "--limit", "finetune=.nan"], "finetune=nan is no number of minutes above 0"),
        (["compress", "--set", "seed=1", "--commit", "nowhere", "--limit", "finetune=.inf"], "no number of minutes"),
        (["compress", "--set", " seed=1", "--set", "seed=2", "--commit", "nowhere"], "seed stands twice"),
        ([*GRID, "--set", "seed=x", "--commit", "nowhere"], "seed stands in --grid and in --set"),
        (["compress", "--commit", ""], "has no commit ''"),
        (["compress", "--limit", "finetune="], "finetune=None is no number of minutes above 0"),
        (["compress", "--limit", "fintune=5"], "fintune"),
        (["compress", "--set", "seed=1", "--limit", "fintune=5"], "fintune"),
        (["sweep", "--grid", "seed=1", "--limit", "fintune=5"], "fintune"),
        (["nightly", "--limit", "fintune=5"], "fintune"),
        (["sweep", "--grid", "seed="], "the grid has no cells"),
        (["sweep", "--grid", "seed=[]"], "the grid has no cells"),
        (["sweep", "--grid", "seed"], "--grid seed is not KEY=VALUE"),
        (["sweep", "--grid", "seed=1", "--grid", "seed=2"], "--grid seed stands twice"),
        (["sweep", "--grid", "seed=1,b"], "seed is 'b'"),
        (["sweep", "--grid", "sede=1,2"], "sede is not a known key"),
        (["sweep", "--grid", "seed=1", "--set", "finetune.steps=many"], "finetune.steps is 'many'"),
        (["nightly", "--set", "finetune.steps=many"], "finetune.steps is 'many'"),
        (["compress", "--commit", "nowhere"], "has no commit 'nowhere'"),
        (["sweep", "--grid", "seed=1", "--commit", "nowhere"], "has no commit 'nowhere'"),
        (["nightly", "--commit", "nowhere"], "has no commit 'nowhere'"),
        (["compress", "--preset", "nonsense"], "has no preset 'nonsense'; it has digits"),
        ([*GRID, "--preset", "nonsense"], "has no preset 'nonsense'; it has digits"),
        ([*COMPARE[:-1], "nonsense"], "has no preset 'nonsense'; it has digits"),
        ([*COMPARE, "--rows", "ours,theirs"], "there is no row 'theirs'; the rows are scratch, random"),
        ([*COMPARE, "--seeds", "0,0"], "--seeds 0,0 is no list of unlike numbers from 0"),
        ([*COMPARE, "--set", "seed=1"], "seed is what rows and seeds decide"),
        ([*COMPARE, "--set", "finetune.steps=many"], "finetune.steps is 'many'"),
        ([*COMPARE, "--limit", "fintune=5"], "fintune"),
        (["deploy", "--file", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
        (["deploy"], "no Prefect server is named"),
        (["promote", "espalier-digits", "--policy", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_at_once(refused, arguments, words):
    """Its place and value are named, and no server was started to find it."""
    said = refused(*arguments)

    assert words in said
    assert len(said.splitlines()) == 1
    assert said.startswith("Error: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compres"], "No such command 'compres'"),
        (["compress", "--sett", "seed=1"], "No such option"),
        (["compress", "seed=1"], "Got unexpected extra argument"),
        ([*GRID, "--jobs", "0"], "Invalid value for '--jobs': 0 is not in the range x>=1"),
        ([*GRID, "--jobs", "two"], "Invalid value for '--jobs': 'two' is not a valid integer"),
        ([*GRID, "--best", "-1"], "Invalid value for '--best': -1 is not in the range x>=0"),
        ([*GRID, "--runner", "sloth"], "Invalid value for '--runner': 'sloth' is not one of"),
        (["sweep"], "Missing option '--grid'"),
        (["compare"], "Missing option '--preset'"),
        (["promote"], "Missing argument 'NAME'"),
        (["rollback", "espalier-digits"], "Missing option '--why'"),
    ],
)
def test_a_wrong_option_is_told_as_click_does(refused, arguments, words):
    """With the usage above it, as every program here."""
    said = refused(*arguments, code=2)

    assert words in said.splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "params.yaml: No such file or directory"),
        (["params.yaml"], "dvc.yaml here lists no stages"),
    ],
)
def test_a_folder_that_is_no_project_is_one_line(refused, tmp_path, files, words):
    """With what is missing, and nothing is made in it."""
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in files:
        shutil.copyfile(ROOT / name, empty / name)
    said = refused("compress", cwd=empty)

    assert words in said
    assert len(said.splitlines()) == 1
    assert sorted(path.name for path in empty.iterdir()) == files


def test_help_imports_nothing_heavy():
    """Neither for all commands nor for one, so that it answers at once."""
    code = HELP.replace("HEAVY", repr(HEAVY))
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ
    )

    assert (result.returncode, result.stdout.split()) == (0, []), result.stderr
    assert len(main.commands) >= 8
