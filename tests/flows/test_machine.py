"""Times are taken while no other run of the machine computes; everything else runs side by side."""

import errno
import fcntl
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
from click.testing import CliRunner, Result
from prefect import flow
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.__main__ import main
from flows.tasks.runners import compress_here, open_runner
from flows.workspaces.machine import at_work, machine_lock
from flows.workspaces.overrides import apply
from flows.workspaces.repository import HOME_VARIABLE, REPOSITORY_VARIABLE, locked
from flows.workspaces.workspace import Workspace
from stages.runtime.environment import SHARED_VARIABLE
from stages.runtime.errors import InputError
from tests.records import STAGES
from tests.repository import commit, git
from tests.servers import ROOT

HOLD = """
import sys
from pathlib import Path
from flows.workspaces.machine import at_work
with at_work(Path(sys.argv[1]), print, alone=sys.argv[2] == "alone"):
    print("inside", flush=True)
    sys.stdin.read()
"""
TRACE = """
import json, sys, time
from pathlib import Path
from ruamel.yaml import YAML

name, trace = sys.argv[1:]
cell = YAML(typ="safe").load(Path("params.yaml").read_text())["finetune"]["steps"]
begin = time.time()
time.sleep({("finetune", 1): 1, ("finetune", 2): 8}.get((name, cell), 2))
with open(trace, "a") as file:
    file.write(json.dumps([name, cell, begin, time.time()]) + "\\n")
Path(f"{name}.out").write_text(str(begin))
"""
PIPELINE = """
stages:
  finetune: {{cmd: python trace.py finetune {trace}, params: [finetune], outs: [finetune.out]}}
  costs: {{cmd: python trace.py costs {trace}, deps: [finetune.out], outs: [costs.out]}}
"""


def overlap(one, other):
    """Whether two spans of time have a moment in common."""
    return one[-2] < other[-1] and other[-2] < one[-1]


def check_spans(spans):
    """Check that spans of costs overlap with no other, and that the two trainings do."""
    trainings, costs = ([span for span in spans if span[0] == name] for name in ("finetune", "costs"))
    assert (len(trainings), len(costs)) == (2, 2)
    assert overlap(*trainings)
    assert [(one, two) for one in costs for two in spans if one is not two and overlap(one, two)] == []


def test_times_are_taken_alone_and_the_rest_side_by_side(tmp_path):
    """Of two cells on threads, the first to train waits with its times until the other has trained, too."""
    spans, logs, lock = [], [], tmp_path / "locks" / "machine.lock"

    def compress(cell, training_s):
        for name, seconds in (("finetune", training_s), ("costs", 0.2)):
            with at_work(lock, logs.append, alone=name == "costs"):
                begin = time.monotonic()
                time.sleep(seconds)
                spans.append((name, cell, begin, time.monotonic()))

    threads = [threading.Thread(target=compress, args=cell) for cell in ((1, 0.3), (2, 0.9))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    check_spans(spans)
    assert "waiting until no other run computes on this machine" in logs


@pytest.mark.parametrize(("first", "second"), [("alone", "beside"), ("beside", "alone"), ("alone", "alone")])
def test_another_process_waits_until_the_first_ends_or_is_killed(tmp_path, first, second):
    """The system releases what a killed process held; two that compute do not wait for each other."""
    lock, log = tmp_path / "machine.lock", []
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock), first],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "inside\n"
    if first == "beside":
        with at_work(lock, log.append, alone=False):
            assert log == []
    threading.Timer(0.3, holder.kill).start()
    with at_work(lock, log.append, alone=second == "alone"):
        assert holder.wait() != 0
    holder.communicate()
    alone = "waiting until no other run computes on this machine"
    assert log == [alone if second == "alone" else "waiting for a run that takes times"]


@pytest.mark.parametrize("take", [partial(at_work, alone=True), locked])
@pytest.mark.parametrize("reason", ["Is a directory", "No locks available"])
def test_a_lock_that_the_system_refuses_is_one_line(tmp_path, monkeypatch, take, reason):
    """It names the file and what to do: not every lock that cannot be had is somebody else's, for whom to wait."""
    lock = tmp_path / "machine.lock"
    if reason == "Is a directory":
        lock.mkdir()
    else:
        monkeypatch.setattr(fcntl, "flock", refuse)  # as NFS without its lock service

    with pytest.raises(InputError) as caught, take(lock, print):
        pass
    remedy = "set ESPALIER_HOME to a folder of your own, on a file system that has locks"
    assert caught.value.message == f"cannot lock {lock}: {reason}; {remedy}"


def refuse(*_):
    """Refuse a lock as a file system without locks."""
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.parametrize(
    ("changes", "environment", "expected"),
    [
        ({}, {}, ["costs"]),
        ({"prune.target": {"latency_ms": "80%"}}, {}, ["prune", "costs"]),
        ({"finetune.snapshots": [1]}, {}, ["finetune", "costs"]),
        ({"finetune.snapshots": [1]}, {SHARED_VARIABLE: "1"}, ["costs"]),
    ],
)
def test_the_stages_that_take_times_are_known(tmp_path, changes, environment, expected):
    """The costs always, pruning where its target is a latency, a training with snapshots unless it is to share."""
    (tmp_path / "params.yaml").write_bytes(apply(changes, ROOT / "params.yaml"))
    workspace = Workspace(tmp_path, tmp_path, environment=environment)

    assert [stage for stage in STAGES if workspace.takes_times(stage)] == expected


def test_runs_of_one_folder_and_machine_share_a_lock(tmp_path, monkeypatch):
    """The checkout's with those of the workspaces; without a folder of their own they have .espalier."""
    monkeypatch.chdir(tmp_path)
    for name in (HOME_VARIABLE, REPOSITORY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    assert Workspace(tmp_path, tmp_path).machine == machine_lock(tmp_path / ".espalier")

    (tmp_path / "repository").mkdir()
    monkeypatch.setenv(REPOSITORY_VARIABLE, str(tmp_path / "repository"))
    assert machine_lock() == machine_lock(tmp_path / "repository" / ".espalier")

    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    assert machine_lock() == machine_lock(tmp_path / "home") != machine_lock(tmp_path / ".espalier")
    assert machine_lock().parent == tmp_path / "home" / "locks"


@pytest.mark.parametrize("command", [("promote", "m"), ("rollback", "m", "--why", "x"), ("reproduce", "models:/m/1")])
def test_commands_of_the_registry_wait_for_a_run_that_takes_times(tmp_path, monkeypatch, command):
    """They draw and train as runs do, also without a server of Prefect."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("PREFECT_API_URL", "")
    monkeypatch.setattr("flows.tasks.server.find_server", lambda: None)
    shutil.copytree(ROOT / "mlflow", tmp_path / "mlflow")
    results: list[Result] = []
    with at_work(machine_lock(), print, alone=True):
        thread = threading.Thread(target=lambda: results.append(CliRunner().invoke(main, [*command])))
        thread.start()
        thread.join(timeout=3)
        assert thread.is_alive()
    thread.join(timeout=60)

    assert "waiting for a run that takes times" in results[0].stderr
    assert results[0].exit_code == 1
    assert re.search(r"Error: (the registry has no model|m has no version)", results[0].stderr), results[0].output


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_a_run_makes_is_closed_to_others(tmp_path, monkeypatch, exists):
    """Whoever made the one that ESPALIER_HOME names chose who may enter."""
    home = tmp_path / "home"
    monkeypatch.setenv(HOME_VARIABLE, str(home))
    previous = os.umask(0o022)
    try:
        if exists:
            home.mkdir()
        with at_work(machine_lock(), print, alone=False):
            pass
    finally:
        os.umask(previous)

    assert stat.S_IMODE(home.stat().st_mode) == (0o755 if exists else 0o700)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A committed DVC project whose stages note when they ran, as the current folder; and the file of notes."""
    folder, trace = tmp_path / "project", tmp_path / "trace"
    folder.mkdir()
    (folder / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    (folder / "trace.py").write_text(TRACE)
    (folder / "dvc.yaml").write_text(PIPELINE.format(trace=trace))
    (folder / ".gitignore").write_text("/*.out\n/.espalier/\n")
    git(folder, "init", "-q")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=folder, check=True)
    commit(folder)
    for name in (HOME_VARIABLE, REPOSITORY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.chdir(folder)
    return trace


@pytest.mark.e2e
def test_a_cell_of_a_sweep_is_not_timed_while_another_trains(project, prefect_server):
    """Two cells at once on threads, in real workspaces, by DVC: the short one waits with its times for the long one."""

    def submit(slots, steps):
        label = f"steps {steps}"
        return compress_here.submit({"finetune.steps": steps}, "HEAD", {}, None, label, slots, to_register=False)

    with open_runner("threads", 2, None) as (runner, slots):

        @flow(task_runner=runner, persist_result=False)
        def sweep():
            for future in [submit(slots, 1), submit(slots, 2)]:
                future.wait()  # each fails at the record, since the project has no stages.tracking

        settings = {PREFECT_API_URL: prefect_server.uri, PREFECT_API_AUTH_STRING: prefect_server.auth}
        with temporary_settings(settings):
            sweep(return_state=True)

    spans = [json.loads(line) for line in project.read_text().splitlines()]
    check_spans(spans)
    assert [name for name, *_ in spans] == ["finetune", "finetune", "costs", "costs"]
