"""Lines of `dvc repro` -> place, time left, and forecast beside fact."""

import fcntl
import subprocess
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from flows.workspaces import running, status_line
from flows.workspaces.machine import machine_lock
from flows.workspaces.running import RunProgress, refuse, run_stages
from flows.workspaces.staleness import StageStatus
from flows.workspaces.status_line import StatusLine
from stages.runtime.errors import InputError
from tests.orchestra import until
from tests.repository import git
from tests.servers import ROOT


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is moved."""
    now = [100.0]
    monkeypatch.setattr(running.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def progress(clock):
    """A run of three stages that begins."""
    return RunProgress({"fetch": 10.0, "prune": 20.0, "costs": 30.0}, begun=clock[0])


def test_each_stage_is_named_with_its_place_and_the_time_left_in_all(progress, clock, capsys):
    """The time left is that of the stage at work and of those after it."""
    progress.read("Running stage 'fetch':")
    clock[0] += 12
    progress.read("Running stage 'prune':")
    clock[0] += 5

    assert progress.place() == "stage 2 of 3, prune"
    assert progress.times() == "17 s so far, about 45 s left in all"
    assert capsys.readouterr().out.splitlines() == [
        "── stage 1 of 3, fetch: 0 s so far, about 1 min 0 s left in all",
        "── stage 2 of 3, prune: 12 s so far, about 50 s left in all",
    ]


def test_a_stage_that_dvc_leaves_out_counts_no_more(progress):
    """DVC finds out that an output stayed the same, and what was expected to follow does not."""
    progress.read("Running stage 'fetch':")
    progress.read("Stage 'prune' didn't change, skipping")
    progress.read("Running stage 'costs':")

    assert progress.place() == "stage 2 of 2, costs"


def test_a_stages_own_report_counts_where_it_is_longer_than_the_forecast(progress, clock):
    """A forecast that has passed is no reason to promise an end."""
    progress.read("Running stage 'costs':")
    clock[0] += 60
    progress.update({"label": "time", "done": 1, "total": 4, "rate_per_s": 0.01, "left_s": 300.0})

    assert progress.left_s() == pytest.approx(300 + 30)
    assert progress.status() == "stage 1 of 3, costs (time 1/4): 1 min 0 s so far, about 5 min 30 s left in all"


def test_what_long_stages_took_corrects_the_forecast_of_those_that_wait(clock):
    """Passes timed on a busy machine forecast days; a stage that starts and ends needs what it needs."""
    progress = RunProgress({"fetch": 10.0, "reference": 3000.0, "evaluate": 2000.0, "report": 20.0}, begun=clock[0])
    for name, seconds in (("fetch", 20), ("reference", 30)):
        progress.read(f"Running stage '{name}':")
        clock[0] += seconds
    progress.end()

    assert progress.left_s() == pytest.approx(2000 / 100 + 20)
    progress.read("Running stage 'evaluate':")
    clock[0] += 5
    assert progress.left_s() == pytest.approx(20 - 5 + 20)


def test_the_sets_of_the_first_long_stage_correct_the_forecast_while_it_runs(clock):
    """An absurd forecast does not stay until the stage ends: one set took ten seconds, so three take thirty."""
    progress = RunProgress({"reference": 3000.0, "evaluate": 6000.0, "report": 20.0}, begun=clock[0])
    progress.read("Running stage 'reference':")
    clock[0] += 15
    progress.update({"label": "draw dense, set 1 of 4, batch", "done": 5, "total": 5, "rate_per_s": 0.5, "left_s": 0.0})

    assert progress.left_s() == pytest.approx(30 + 2 * (15 + 30) + 20)


def test_a_training_that_goes_on_from_a_checkpoint_needs_what_is_left_of_it(clock):
    """The forecast is that of all steps; the stage's own report counts from the checkpoint."""
    progress = RunProgress({"finetune": 600.0, "report": 20.0}, begun=clock[0])
    progress.read("Running stage 'finetune':")
    clock[0] += 5
    assert progress.left_s() == pytest.approx(595 + 20)
    progress.update({"label": "finetune, step", "done": 90, "total": 100, "rate_per_s": 1.0, "left_s": 10.0})
    assert progress.left_s() == pytest.approx(10 + 20)


def test_without_a_forecast_no_time_left_is_promised(clock):
    """The stages alone are counted."""
    progress = RunProgress({"fetch": None}, begun=clock[0])
    progress.read("Running stage 'fetch':")

    assert progress.times() == "0 s so far"
    progress.end()
    assert not list(progress.comparison(failed=False))


def test_the_end_shows_forecast_and_fact_without_the_stage_that_failed(progress, clock):
    """A stage that ended early says nothing about its forecast."""
    for name, seconds in (("fetch", 12), ("prune", 18), ("costs", 1)):
        progress.read(f"Running stage '{name}':")
        clock[0] += seconds
    progress.end()
    table = [line.split("  ") for line in progress.comparison(failed=True)]

    assert [row[0] for row in table] == ["stage", "fetch", "prune", "together"]
    assert table[-1][-1] == "30 s"


def test_a_run_that_a_stage_will_refuse_stops_before_it_computes(capsys):
    """Every refusal is one line; without one it goes on."""
    with pytest.raises(InputError, match=r"^prune\.target .* is out of reach; no stage was run$"):
        refuse(["finetune.batch_size 16 is too large", "prune.target 1 MACs is out of reach"], [])
    assert capsys.readouterr().err == "Error: finetune.batch_size 16 is too large\n"
    refuse([], [])


def test_what_a_stage_may_refuse_is_only_warned_of(capsys):
    """Other refusals still stop the run."""
    refuse([], ["prune.target 1 ms is out of reach"])
    assert capsys.readouterr().err == "Warning: a stage may refuse this: prune.target 1 ms is out of reach\n"
    with pytest.raises(InputError, match="batch_size"):
        refuse(["finetune.batch_size 16 is too large"], ["prune.target 1 ms is out of reach"])


@pytest.mark.parametrize("arguments", [[], ["finetune"]])
def test_a_stage_alone_may_not_need_what_is_refused(tmp_path, monkeypatch, capsys, arguments):
    """With its name all refusals are warnings."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    statuses = [StageStatus("finetune", "runs")]
    monkeypatch.setattr(running, "find_statuses", lambda *_, **__: statuses)
    monkeypatch.setattr(running, "upstream", lambda *_: ["finetune"])
    planned = {"refusals": ["finetune.batch_size 16 is too large"], "possible_refusals": ["prune.target 1 ms"]}
    monkeypatch.setattr(running, "_plan", lambda: planned)

    if not arguments:
        with pytest.raises(InputError, match="16 is too large; no stage was run"):
            running._forecast(arguments)
        return
    assert running._forecast(arguments) == {"finetune": None}
    assert capsys.readouterr().err.count("Warning: a stage may refuse this: ") == 2


@pytest.mark.parametrize(
    ("program", "limit_s", "message"),
    [
        ("exec sleep 60", 1, "a pass takes too long to time it within 1 s"),
        ("echo 'Error: broken' >&2", 60, "Error: broken"),
        ("true", 60, "nothing was printed"),
        (None, 60, "[Errno 2] No such file or directory"),
    ],
)
def test_a_run_without_a_forecast_goes_on_and_says_why(tmp_path, monkeypatch, capsys, program, limit_s, message):
    """What the plan would have refused is not known then."""
    python = tmp_path / "python"
    if program:
        python.write_text(f"#!/bin/sh\n{program}\n")
        python.chmod(0o755)
    monkeypatch.setattr(running, "sys", SimpleNamespace(executable=str(python)))
    monkeypatch.setattr(running, "FORECAST_LIMIT_S", limit_s)

    assert running._plan() == {}
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"Warning: no forecast: {message}")
    assert line.endswith("; what stages would refuse was not checked")


def test_a_terminal_shows_the_state_below_the_lines(progress, monkeypatch, capsys):
    """Cut to its width, renewed after each line, and removed at the end; a pipe gets the lines alone."""
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(status_line, "TICK_S", 60)
    with running._shown(progress):
        assert progress.display is None
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    with running._shown(progress):
        progress.read("Running stage 'fetch':")
        progress.read("loaded")
    found = capsys.readouterr()

    assert found.out == "── stage 1 of 3, fetch: 0 s so far, about 1 min 0 s left in all\nloaded\n"
    assert found.err.split("\r\x1b[K") == ["", "", "stage 1 of 3, fetch", "", "stage 1 of 3, fetch", ""]


def test_the_state_is_renewed_between_lines(monkeypatch):
    """A long stage prints nothing for minutes."""
    calls = []
    monkeypatch.setattr(status_line, "TICK_S", 0.01)
    with StatusLine(lambda: calls.append(1) or ""):
        assert until(lambda: len(calls) > 1, 30)


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """The current folder: a project of DVC that has this dvc.yaml."""

    def make(stages):
        (tmp_path / "dvc.yaml").write_text(stages)
        git(tmp_path, "init", "-q")
        subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=tmp_path, check=True)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        monkeypatch.delenv("ESPALIER_HOME", raising=False)
        return tmp_path

    return make


@pytest.mark.e2e
def test_no_other_run_takes_times_beside_it(bare, tmp_path):
    """While a stage runs, the machine is not to be had alone; afterwards it is."""
    lock = machine_lock(tmp_path / ".espalier")
    bare(f"stages:\n  one: {{cmd: '! flock --nonblock --exclusive {lock} true && echo made > out', outs: [out]}}\n")

    assert run_stages([]) == 0
    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.e2e
def test_a_run_counts_its_stages_and_ends_with_dvcs_exit_code(bare):
    """A real DVC: one stage that works, and one that fails; a pipe gets plain lines."""
    stages = "stages:\n  one: {cmd: echo made > out, outs: [out]}\n  two: {cmd: exit 3, deps: [out], outs: [never]}\n"
    folder = bare(stages)
    runner = CliRunner()
    with runner.isolation() as (out, *_):
        code = run_stages([])
        text = out.getvalue().decode()

    assert code
    assert "── stage 1 of 1, one: " in text
    assert "\x1b" not in text
    assert (folder / "out").read_text() == "made\n"
