"""Two runs in one checkout: a real DVC, and one of them waits for the other."""

import logging
import re
import signal
import subprocess
import sys

import psutil
import pytest
from dvc.exceptions import DvcException
from dvc.stage.exceptions import StageCmdFailedError

from flows.workspaces import dvc_command
from flows.workspaces.checkout import lock_checkout
from stages.runtime.errors import InputError
from tests.orchestra import bare_environment, until
from tests.repository import commit, git
from tests.servers import ROOT

STAGES = """
stages:
  slow: {cmd: echo run >> runs; sleep 2; echo made > out, outs: [out]}
"""


@pytest.fixture
def project(tmp_path):
    """A folder with a DVC project of one stage, which takes two seconds."""
    (tmp_path / "dvc.yaml").write_text(STAGES)
    git(tmp_path, "init", "-q")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


@pytest.fixture
def bare(tmp_path):
    """A folder with Git and with the folders of DVC."""
    git(tmp_path, "init", "-q")
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def start(project):
    """Start `espalier repro` in the project; what is left at the end is killed."""
    started = []

    def begin():
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = [sys.executable, "-m", "flows", "repro"]
        environment = bare_environment(PYTHONPATH=str(ROOT))
        started.append(subprocess.Popen(command, cwd=project, env=environment, start_new_session=True, **pipes))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_the_second_run_waits_and_names_the_first(project, start):
    """Both succeed, and the stage ran once; DVC alone would end the second as busy."""
    first = start()
    assert until((project / "runs").exists)
    second = start()
    line = second.stdout.readline()

    assert line == f"waiting for another run that works in this checkout (process {first.pid}, checkout)\n"
    assert [process.wait(60) for process in (first, second)] == [0, 0]
    assert "Data and pipelines are up to date" in second.stdout.read()
    assert (project / "runs").read_text() == "run\n"


def test_only_the_stage_of_a_killed_run_is_waited_for(project, start):
    """The lock ends with DVC; a stage that still runs, and could write its output beside the next one, is named."""
    first = start()
    assert until((project / "runs").exists)
    (stage,) = psutil.Process(first.pid).children()
    first.kill()
    first.wait()
    lines = []
    lock_checkout(project, lines.append).close()

    assert lines[0] == f"waiting for process {stage.pid}, a stage that still runs in this checkout"
    assert (project / "out").read_text() == "made\n"


@pytest.mark.parametrize("has_commit", [True, False])
@pytest.mark.parametrize("rest", ["", "schema: '2.", "schema: '2.0'\n", "schema: '2.0'\nstages:\n"])
def test_files_that_a_kill_cut_off_are_mended(bare, has_commit, rest):
    """DVC empties both before it writes them, and refuses what is left; what it cannot read now is replaced."""
    whole = "schema: '2.0'\nstages:\n  slow:\n    cmd: x\n"
    if has_commit:
        (bare / "dvc.lock").write_text(whole)
        commit(bare)
    (bare / "dvc.lock").write_text(rest)
    (bare / ".dvc/tmp/rwlock").write_text("")
    lines = []
    lock_checkout(bare, lines.append).close()

    assert [line.partition(";")[0] for line in lines] == ["dvc.lock was cut off by a kill"]
    assert (bare / "dvc.lock").exists() == has_commit
    assert not has_commit or (bare / "dvc.lock").read_text() == whole
    assert (bare / ".dvc/tmp/dvc.lock.cut").read_text() == rest
    assert not (bare / ".dvc/tmp/rwlock").exists()


@pytest.mark.parametrize("content", ["schema: '2.0'\nstages: {}\n", "<<<<<<< HEAD\nschema: '2.0'\n=======\n", None])
def test_a_whole_file_and_one_with_conflicts_stay(bare, content):
    """Somebody has to solve the conflicts, and DVC says so."""
    if content:
        (bare / "dvc.lock").write_text(content)
    (bare / ".dvc/tmp/rwlock").write_text("{}")
    lock_checkout(bare, pytest.fail).close()

    assert not content or (bare / "dvc.lock").read_text() == content
    assert (bare / "dvc.lock").exists() == bool(content)
    assert (bare / ".dvc/tmp/rwlock").exists()


def test_a_folder_without_dvc_is_one_line(tmp_path):
    """Nothing is made in it."""
    with pytest.raises(InputError, match=re.escape("has no .dvc folder; set DVC up first: dvc init")):
        lock_checkout(tmp_path, print)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_one_line(bare):
    """It names the file and the reason."""
    (bare / ".dvc/tmp").rmdir()
    (bare / ".dvc/tmp").touch()

    with pytest.raises(InputError, match=r"checkout.lock cannot be written \(File exists\)"):
        lock_checkout(bare, print)


INTERRUPTED = """
stages:
  slow: {cmd: %s stage.py, outs: [out]}
"""
STAGE = """
import pathlib, sys, time
sys.path.insert(0, %r)
from stages.runtime.parent import end_with_dvc

end_with_dvc()
pathlib.Path("runs").touch()
time.sleep(60)
"""


@pytest.mark.e2e
def test_ctrl_c_ends_a_run_in_one_line(project, start):
    """A terminal sends it to DVC and to the stage: neither says that it was aborted or failed."""
    (project / "dvc.yaml").write_text(INTERRUPTED % sys.executable)
    (project / "stage.py").write_text(STAGE % str(ROOT))
    process = start()
    assert until((project / "runs").exists)
    for child in [*psutil.Process(process.pid).children(recursive=True), process]:
        child.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]

    assert process.returncode == 128 + signal.SIGINT
    assert "Stopped by SIGINT (Ctrl-C): what is finished is kept; run the same command again to go on" in said
    assert not re.search("ERROR|Abort|Traceback", said)


@pytest.mark.parametrize(("code", "is_printed"), [(130, False), (1, True), (143, True)])
def test_dvc_is_silent_about_a_stage_that_ctrl_c_stopped_only(code, is_printed):
    """Other errors of a stage keep DVC's line, which says which stage it was."""
    error = DvcException("failed to reproduce 'slow'")
    error.__cause__ = StageCmdFailedError("python -m stages.slow", code)
    record = logging.LogRecord("dvc.cli", logging.ERROR, "", 0, "", (), (DvcException, error, None))
    stopped = dvc_command.StoppedFilter()

    assert stopped.filter(record) == is_printed
    assert stopped.found != is_printed
