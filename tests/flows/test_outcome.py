"""The outcome of a compression: a label of its flow run, which a sweep reads whatever the run's message."""

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed

from flows.tasks import runners
from flows.tasks.outcome import Outcome, attach_outcome, read_outcome
from flows.tasks.stages import run_for
from flows.workspaces.workspace import Workspace
from stages.runtime.errors import InputError

ODD = "Error: ran x; MLflow run y; models:/none/9"
OUTCOME = Outcome(ran=("prune", "odd; name"), mlflow_run="abc", version="models:/a; b/3")


@pytest.fixture
def prefect(prefect_server):
    """Connect this process to a real server."""
    settings = {PREFECT_API_URL: prefect_server.uri, PREFECT_API_AUTH_STRING: prefect_server.auth}
    with temporary_settings(settings):
        yield


def finished_run(outcome, state):
    """Run a flow to its end, with or without an outcome: the run as the server keeps it."""
    ids = []

    @flow(persist_result=False)
    def compress():
        ids.append(flow_run.id)
        if outcome:
            attach_outcome(outcome)
        return state

    compress(return_state=True)
    with get_client(sync_client=True) as client:
        return client.read_flow_run(ids[0])


@pytest.mark.usefixtures("prefect")
def test_an_outcome_travels_with_its_flow_run():
    """The server returns what was attached; a run without an outcome is an error of one line."""
    assert read_outcome(finished_run(OUTCOME, Completed(message=ODD))) == OUTCOME
    with pytest.raises(InputError, match=r"has no label espalier\.outcome; update the workers"):
        read_outcome(finished_run(None, Completed(message=ODD)))


@pytest.mark.usefixtures("prefect")
@pytest.mark.parametrize("state_type", [Completed, Failed])
def test_a_cell_of_a_pool_has_the_outcome_of_its_run(monkeypatch, state_type):
    """The run's message is shown and not parsed; a failed run is a failed cell."""
    run = finished_run(OUTCOME, state_type(message=ODD))
    monkeypatch.setattr(runners, "_find_run", lambda _tag: run)

    @flow(persist_result=False)
    def sweep():
        state = runners.compress_on_pool({}, "HEAD", {}, None, "cell", to_register=False, return_state=True)
        found.append((state.message, state.result() if state.is_completed() else None))

    found = []
    sweep()

    assert found == [(ODD, OUTCOME if state_type is Completed else None)]


@pytest.mark.usefixtures("prefect")
@pytest.mark.parametrize("limits", [{}, {"finetune": 5.0}])
def test_a_cell_of_a_pool_has_the_limits_of_its_deployment_unless_others_are_given(monkeypatch, limits):
    """An empty parameter would replace them, since Prefect lets those of a run take precedence."""
    sent, run = [], finished_run(OUTCOME, Completed(message=ODD))
    monkeypatch.setattr(runners, "run_deployment", lambda _name, parameters, **_: sent.append(parameters) or run)

    @flow(persist_result=False)
    def sweep():
        runners.compress_on_pool({"seed": 1}, "HEAD", limits, None, "cell", to_register=False, return_state=True)

    sweep()

    (parameters,) = sent
    assert parameters["overrides"] == {"seed": 1}
    assert ("limits" in parameters, parameters.get("limits", {})) == (bool(limits), limits)


@pytest.mark.usefixtures("prefect")
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("write_result(mlflow_run='abc'); print('MLflow run other: recorded')", ("Completed", "abc", "abc")),
        (f"raise UnavailableError({ODD!r})", ("Unavailable", f"{ODD} (exit code 75)", None)),
        (f"raise InputError({ODD!r})", ("Failed", f"{ODD} (exit code 1)", None)),
        (f"print({ODD!r})", ("Failed", "recorder of this commit does not write mlflow_run", None)),
    ],
)
def test_a_record_is_read_from_the_result_file(tmp_path, code, expected):
    """Printed text that looks like a result or an error changes nothing."""
    (tmp_path / "recorder.py").write_text(f"""
import click
from stages.runtime.errors import InputError, UnavailableError
from stages.runtime.result import write_result
@click.command()
@click.option("--unsent")
def main(unsent):
    print("Error: not this")
    {code}
main()
""")

    @flow(persist_result=False)
    def record():
        found.append(run_for("mlflow_run", "recorder", Workspace(tmp_path, tmp_path)))

    found = []
    record()

    (state,) = found
    name, message, data = expected
    assert (state.name, state.data) == (name, data)
    assert state.message.startswith(message)
