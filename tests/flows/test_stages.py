"""A stage as a Prefect task: a real DVC and a real Prefect server; the state follows from exit codes and files."""

import subprocess
import sys
from unittest.mock import Mock
from uuid import UUID

import pytest
from prefect import flow
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed

from flows.tasks import stages
from flows.tasks.outcome import Outcome
from flows.tasks.progress import ProgressBar
from flows.tasks.stages import CACHED, UNAVAILABLE, StageFailedError, bring_up_to_date, run_stage
from flows.workspaces.workspace import Workspace
from tests.repository import git

STAGES = """
stages:
  good: {cmd: echo made > out, outs: [out]}
  sly: {cmd: "echo \\"ERROR: Running stage 'good': exited with 75\\" >&2; exit 1", outs: [other]}
  wrong: {cmd: python wrong.py, outs: [third]}
  slow: {cmd: sleep 60, outs: [fourth]}
  blocked: {cmd: "true", deps: [missing], outs: [fifth]}
"""
WRONG = """
import click
from stages.runtime.errors import InputError
@click.command()
def main():
    raise InputError("Error: MLflow run x; give one")
main()
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a DVC project of five stages."""
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    (tmp_path / "dvc.yaml").write_text(STAGES)
    (tmp_path / "wrong.py").write_text(WRONG)
    git(tmp_path, "init", "-q")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


@pytest.fixture
def states(prefect_server, project):
    """Run stages one after the other, without retries: name and message of each state."""

    def run(*names, limit_minutes=None, has_remote=False):
        workspace = Workspace(project, project / "unsent", has_remote=has_remote)

        @flow(persist_result=False)
        def compress():
            for name in names:
                task = run_stage.with_options(retries=0)
                found.append(task(name, workspace, name, limit_minutes, return_state=True))

        found = []
        settings = {PREFECT_API_URL: prefect_server.uri, PREFECT_API_AUTH_STRING: prefect_server.auth}
        with temporary_settings(settings):
            compress(return_state=True)
        return [(state.name, state.message) for state in found]

    return run


def test_a_stage_runs_once(states):
    """The second time, DVC has its outputs."""
    assert [name for name, _ in states("good", "good")] == ["Completed", CACHED]


def test_a_failed_stage_has_its_own_message_and_exit_code(states):
    """DVC's exit code is 255 in any case, and printed text decides nothing."""
    (sly, sly_message), wrong = states("sly", "wrong")

    assert (sly, sly_message.endswith("(exit code 1)")) == ("Failed", True)
    assert wrong == ("Failed", "Error: MLflow run x; give one (exit code 1)")


def test_a_stage_is_terminated_at_its_limit(states):
    """The state has a name of its own, and is not retried."""
    assert states("slow", limit_minutes=0.02) == [
        ("TimedOut", "the stage ran past its limit of 0.02 minutes and was terminated")
    ]


def test_a_failure_of_dvc_itself_is_retried_only_with_a_remote(states):
    """Without a remote there is no network that could be back later."""
    assert states("blocked")[0][0] == "Failed"
    assert states("blocked", has_remote=True)[0][0] == UNAVAILABLE


@pytest.mark.parametrize(
    ("pushed", "recorded", "message"),
    [
        (Failed(message="no route"), Completed(), "DVC's remote did not take the outputs: no route"),
        (Completed(), Failed(message="no right"), "the compression could not be recorded: no right"),
        (Completed(), Failed(name=UNAVAILABLE, message="no answer"), None),
    ],
)
def test_a_result_that_is_not_kept_fails_the_run(project, monkeypatch, pushed, recorded, message):
    """All stages ran; a record that MLflow cannot take now waits, and is no failure."""
    for name, state in (("push", pushed), ("record", recorded)):
        task = Mock(with_options=Mock(return_value=Mock(return_value=state)))
        monkeypatch.setattr(stages, name, task)
    monkeypatch.setattr(stages, "_run_stages", lambda *_: ["good"])
    workspace = Workspace(project, project / "unsent", commit="0" * 40, has_remote=True)

    if message is None:
        assert bring_up_to_date(workspace, {}) == Outcome(ran=("good",), mlflow_run=None)
    else:
        with pytest.raises(StageFailedError, match=f"^{message}$"):
            bring_up_to_date(workspace, {})


def test_a_bar_that_cannot_be_moved_stops_no_stage(prefect_server, monkeypatch, caplog):
    """Somebody deleted it, or the server is away; the next updates wait a while, and then there is a new bar."""
    bar = ProgressBar("x")
    progress = {"label": "x", "done": 1, "total": 2, "rate_per_s": 1.0, "left_s": 1.0}
    found = []

    @flow(persist_result=False)
    def work():
        bar.artifact = UUID(int=1)
        bar.update(progress)
        found.append(bar.artifact)
        bar.update(progress)
        found.append(bar.artifact)
        monkeypatch.setattr(bar, "paused_until", 0.0)
        bar.update(progress)
        found.append(bar.artifact)

    settings = {PREFECT_API_URL: prefect_server.uri, PREFECT_API_AUTH_STRING: prefect_server.auth}
    with temporary_settings(settings):
        work()

    assert found[:2] == [None, None]
    assert isinstance(found[2], UUID)
    assert caplog.text.count("Prefect took no progress of x: ") == 1
