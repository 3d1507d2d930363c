"""python -m flows with bad input: one line at once, before any server is started."""

import shutil
import subprocess
import sys
import time

import psutil
import pytest
from click.testing import CliRunner

from flows.__main__ import main
from tests.orchestra import bare_environment
from tests.repository import make_repository
from tests.servers import ROOT

GRID = ["sweep", "--grid", "seed=1"]
COMPARE = ["compare", "--preset", "digits"]
LONG = "a" * 256
"""One character more than a name on any file system may have."""
QUICK_S = 20
"""A Prefect server alone takes about as long to start; what is measured here takes one second on a quiet machine."""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A small project with one commit, which no test changes."""
    path = tmp_path_factory.mktemp("main") / "project"
    (path / ".dvc").mkdir(parents=True)
    (path / "recipes" / "presets").mkdir(parents=True)
    for name in ("params.yaml", "dvc.yaml", "prefect.yaml", ".dvc/config", "recipes/presets/digits.yaml"):
        shutil.copyfile(ROOT / name, path / name)
    make_repository(path)
    return path


def files(project):
    """Read the files of a project, without those of git and .espalier, in which there is no workspace."""
    assert not (project / ".espalier" / "workspaces").exists()
    found = (path for path in project.rglob("*") if not {".git", ".espalier"} & set(path.parts))
    return {path: path.read_bytes() for path in found if path.is_file()}


@pytest.fixture
def refused(project, monkeypatch):
    """Run a wrong command in this process: its error output. It starts no server, and changes no file."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)

    def run(*arguments, cwd=project, code=1):
        monkeypatch.chdir(cwd)
        before, programs = files(project), psutil.Process().children()
        result = CliRunner().invoke(main, arguments)
        assert (result.stdout, result.exit_code) == ("", code), result.stderr
        assert psutil.Process().children() == programs
        assert files(project) == before
        return result.stderr

    return run


def test_a_mistake_ends_the_process_with_one_line(project, tmp_path):
    """It is quick, starts no server, and changes no file."""
    before, repository = files(project), tmp_path / "prefect"
    begin = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", "flows", "compress", "--set", "prune.tarjet.macs=56%"],
        cwd=project,
        env=bare_environment(PREFECT_HOME=str(repository), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=False,
    )

    assert time.monotonic() - begin < QUICK_S
    assert (result.stdout, result.returncode) == ("", 1)
    assert result.stderr.startswith("Error: ")
    assert "prune.tarjet is not a known key" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list(repository.glob("*.db"))
    assert files(project) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["draw", "--out", LONG],
        ["draw", "--model", LONG, "--out", "out"],
        ["export", "--model", LONG, "--out", "out"],
        ["push", LONG, "me/mine", "--dry-run"],
        ["report", "--reports", LONG],
        ["grid", "--artifacts", LONG],
        ["init", "--model", LONG, "--data", "bundled:digits", "--force"],
        ["init", "--model", "bundled:digits", "--data", "bundled:digits", "--out", LONG],
    ],
)
def test_a_path_that_cannot_be_followed_is_one_line(refused, arguments):
    """A name that is too long here, a folder that one may not enter elsewhere."""
    message = refused(*arguments)
    assert message.startswith("Error: ")
    assert len(message.splitlines()) == 1
    assert message.endswith(": File name too long; correct the path or its permissions\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "--set", "prune.tarjet.macs=56%"], "prune.tarjet is not a known key"),
        (["compress", "--set", "prune.ratio=0.3"], "prune.ratio is not a known key; did you mean prune.target.ratio?"),
        (["compress", "--set", "prune.target.macs=44"], "prune.target.macs is 44: did you mean 44%?"),
        (["compress", "--set", "finetune.steps=many"], "finetune.steps is 'many'"),
        (["compress", "--set", "finetune.steps=0"], "finetune.steps is 0"),
        (
            ["compress", "--set", "finetune.snapshots=[450]"],
            "must rise and stay below steps 450, whose model is the result",
        ),
        ([*COMPARE, "--steps", "1,2"], "--steps and --recipe choose what --curve measures; add --curve"),
        ([*COMPARE, "--curve", "--ablation"], "--curve has no ablation; leave --ablation out"),
        ([*COMPARE, "--curve", "--steps", "2,1"], "--steps 2,1: give two or more rising numbers from 1"),
        (
            [*COMPARE, "--curve", "--rows", "theirs"],
            "there is no row 'theirs'; the rows are noise, noise+output, output, ",
        ),
        (
            [*COMPARE, "--curve", "--recipe", "a={seed: 1}"],
            "--recipe a sets seed; a recipe sets prune.compensate or keys of finetune",
        ),
        ([*COMPARE, "--curve", "--set", "finetune.steps=9"], "finetune.steps is set by rows and seeds"),
        (["compress", "--set", "finetune.steps"], "--set finetune.steps is not KEY=VALUE; write for example --set "),
        (["compress", "--set", "seed=1", "--set", "seed=2"], "--set seed is given twice"),
        (["compress", "--set", "seed=[1"], "is not valid YAML"),
        (["compress", "--limit", "finetune"], "--limit finetune is not KEY=VALUE; write for example --limit "),
        (["compress", "--limit", "finetune=soon"], "limit finetune=soon: give minutes above 0"),
        (["compress", "--limit", "finetune=0"], "limit finetune=0: give minutes above 0"),
        (["compress", "--limit", "finetune=-3"], "limit finetune=-3: give minutes above 0"),
        (["compress", "--limit", "finetune=true"], "limit finetune=True: give minutes above 0"),
        (["compress", "--limit", "finetune=.nan"], "limit finetune=nan: give minutes above 0"),
        (
            ["compress", "--set", "seed=1", "--commit", "nowhere", "--limit", "finetune=.inf"],
            "limit finetune=inf: give minutes",
        ),
        (["compress", "--set", " seed=1", "--set", "seed=2", "--commit", "nowhere"], "seed is given twice"),
        (
            [*GRID, "--set", "seed=x", "--commit", "nowhere"],
            "--grid seed would replace --set seed; leave one of them out",
        ),
        (["compress", "--commit", ""], "has no commit ''"),
        (["compress", "--preset", ""], "has no preset ''; it has digits"),
        (
            ["compress", "--set", "prune.target.macs=44%", "--set", "prune.target={ratio: 0.3}"],
            "--set prune.target would replace --set prune.target.macs; leave one of them out",
        ),
        (
            ["sweep", "--grid", "prune.target.macs=44%", "--grid", "prune.target=[{ratio: 0.3}]"],
            "--grid prune.target would replace --grid prune.target.macs; leave one of them out",
        ),
        (
            ["sweep", "--grid", "finetune.loss=[{noise: 1.0}]", "--set", "finetune.loss.output=0.5"],
            "--grid finetune.loss would replace --set finetune.loss.output; leave one of them out",
        ),
        (
            ["sweep", "--grid", "fetch.model=[{source: bundled, name: digits}, {source: bundled, name: photos}]"],
            "--grid fetch.model varies the dense model, with which the cells of a sweep are compared",
        ),
        (
            ["sweep", "--grid", "reference.num_images=250,500"],
            "--grid reference.num_images varies the protocol, so that the cells of a sweep cannot be compared",
        ),
        (
            ["sweep", "--grid", "reference=[{sets: 1}, {sets: 2}]"],
            "--grid reference varies the protocol, so that the cells of a sweep cannot be compared",
        ),
        (["sweep", "--grid", "fetch.heldout=0.1,0.2"], "--grid fetch.heldout varies the protocol"),
        (
            [*COMPARE, "--curve", "--recipe", "a={finetune.loss.output: 1, finetune.loss: {noise: 1}}"],
            "--recipe a: finetune.loss would replace --recipe a: finetune.loss.output",
        ),
        ([*COMPARE, "--seeds", "1" * 5000], "1: give different numbers from 0"),
        (["compress", "--limit", "finetune="], "limit finetune=None: give minutes above 0"),
        (["compress", "--limit", "fintune=5"], "fintune: no such stage; the stages are"),
        (["compress", "--set", "seed=1", "--limit", "fintune=5"], "fintune: no such stage; the stages are"),
        (["sweep", "--grid", "seed=1", "--limit", "fintune=5"], "fintune: no such stage; the stages are"),
        (["nightly", "--limit", "fintune=5"], "fintune: no such stage; the stages are"),
        (["sweep", "--grid", "seed="], "the grid has no cells"),
        (["sweep", "--grid", "seed=[]"], "the grid has no cells"),
        (["sweep", "--grid", "seed"], "--grid seed is not KEY=VALUE"),
        (["sweep", "--grid", "seed=1", "--grid", "seed=2"], "--grid seed is given twice"),
        (["sweep", "--grid", "seed=1,b"], "seed is 'b'"),
        (["sweep", "--grid", "sede=1,2"], "sede is not a known key; did you mean seed?"),
        (["sweep", "--grid", "seed=1", "--set", "finetune.steps=many"], "finetune.steps is 'many'"),
        (["nightly", "--set", "finetune.steps=many"], "finetune.steps is 'many'"),
        (["compress", "--commit", "nowhere"], "has no commit 'nowhere'"),
        (["sweep", "--grid", "seed=1", "--commit", "nowhere"], "has no commit 'nowhere'"),
        (["nightly", "--commit", "nowhere"], "has no commit 'nowhere'"),
        (["compress", "--preset", "nonsense"], "has no preset 'nonsense'; it has digits"),
        ([*GRID, "--preset", "nonsense"], "has no preset 'nonsense'; it has digits"),
        ([*COMPARE[:-1], "nonsense"], "has no preset 'nonsense'; it has digits"),
        ([*COMPARE, "--rows", "ours,theirs"], "there is no row 'theirs'; the rows are scratch, random"),
        ([*COMPARE, "--seeds", "0,0"], "--seeds 0,0: give different numbers from 0"),
        ([*COMPARE, "--set", "seed=1"], "seed is set by rows and seeds"),
        ([*COMPARE, "--set", "finetune.steps=many"], "finetune.steps is 'many'"),
        ([*COMPARE, "--limit", "fintune=5"], "fintune: no such stage; the stages are"),
        (["deploy", "--file", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
        (["deploy"], "PREFECT_API_URL is not set"),
        (["promote", "espalier-digits", "--policy", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_at_once(refused, arguments, message):
    """It names key and value, and no server was started to find it."""
    output = refused(*arguments)

    assert message in output
    assert len(output.splitlines()) == 1
    assert output.startswith("Error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compres"], "No such command 'compres'. (Did you mean one of: 'compare', 'compress', 'preset'?)"),
        (["ledgers"], "No such command 'ledgers'. Did you mean 'ledger'?"),
        (["compress", "--sett", "seed=1"], "No such option '--sett'. (Did you mean one of: "),
        (["rollback", "espalier-digits", "--wy", "x"], "No such option '--wy'. Did you mean '--why'?"),
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
def test_a_wrong_option_is_a_usage_error(refused, arguments, message):
    """Click prints the usage above it, with exit code 2."""
    output = refused(*arguments, code=2)

    assert message in output.splitlines()[-1]
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "params.yaml: No such file or directory"),
        (["params.yaml"], "dvc.yaml here lists no stages"),
    ],
)
def test_a_folder_without_a_project_is_one_line(refused, tmp_path, files, message):
    """It names what is missing, and no file is written."""
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in files:
        shutil.copyfile(ROOT / name, empty / name)
    output = refused("compress", cwd=empty)

    assert message in output
    assert len(output.splitlines()) == 1
    assert sorted(path.name for path in empty.iterdir()) == files
