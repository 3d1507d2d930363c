"""espalier start: a deployment on a real server becomes a run, whose page is printed and which can be followed."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows import start as start_module
from flows.__main__ import main
from flows.deployments import read_deployments
from flows.draw import draw
from tests.orchestra import until
from tests.servers import ROOT

POOL = "pool-start"
SCHEMA = {
    "type": "object",
    "properties": {
        "overrides": {"anyOf": [{"type": "object"}, {"type": "null"}], "default": None},
        "commit": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": "HEAD"},
        "limits": {"type": "object"},
    },
}
"""Parameters of compress, shortened."""
(DRAWN,) = (it.parameters for it in read_deployments(ROOT / "prefect.yaml") if it.full_name == "draw/draw")
"""Parameters of the deployment draw."""
NEEDS_A_REASON = {"type": "object", "properties": {"name": {"type": "string"}, "why": {"type": "string"}}}


@pytest.fixture(scope="module")
def deployments(prefect_server):
    """Two deployments named one, of different flows, and two with names of their own, in a pool without a worker."""
    template = json.loads((ROOT / "flows" / "pools" / "process.json").read_text())
    prefect_server.request("work_pools/", {"name": POOL, "type": "process", "base_job_template": template})
    made = {}
    for full, schema, parameters in (
        ("compress/one-start", SCHEMA, {"overrides": {"finetune.steps": 7}, "limits": {"fetch": 1}}),
        ("rollback/back-start", NEEDS_A_REASON | {"required": ["name", "why"]}, {"name": "espalier-digits"}),
        ("compress/twice-start", SCHEMA, {}),
        ("sweep/twice-start", SCHEMA, {}),
        ("draw/draw-start", dict(draw.parameters.model_dump_for_openapi()), DRAWN),
    ):
        flow, name = full.split("/")
        flow_id = prefect_server.request("flows/", {"name": flow})["id"]
        body = {"name": name, "flow_id": flow_id, "work_pool_name": POOL, "parameters": parameters}
        body |= {"parameter_openapi_schema": schema, "enforce_parameter_schema": True}
        made[full] = prefect_server.request("deployments/", body)["id"]
    yield made
    for found in made.values():
        prefect_server.request(f"deployments/{found}", method="DELETE")


@pytest.fixture
def start(deployments, prefect_server, monkeypatch, root):
    """Run `espalier start` in the project: exit code, lines, and the runs of the deployments that it made."""
    monkeypatch.chdir(root)
    for name, value in prefect_server.client_environment().items():
        monkeypatch.setenv(name, value)
    query = {"deployments": {"id": {"any_": list(deployments.values())}}, "sort": "EXPECTED_START_TIME_DESC"}

    def run(*arguments):
        before = {it["id"] for it in prefect_server.request("flow_runs/filter", query)}
        with temporary_settings({PREFECT_API_URL: prefect_server.uri, PREFECT_API_AUTH_STRING: prefect_server.auth}):
            result = CliRunner().invoke(main, ["start", *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        new = [it for it in prefect_server.request("flow_runs/filter", query) if it["id"] not in before]
        return SimpleNamespace(code=result.exit_code, lines=result.output.splitlines(), runs=new)

    return run


def test_a_deployment_becomes_a_run_whose_page_is_printed(start, prefect_server, deployments):
    """Overrides are added to those of the deployment; a pool without a worker is named."""
    found = start("one-start", "--set", "finetune.batch_size=3", "--param", "commit=main")
    (run,) = found.runs

    assert found.code == 0
    assert run["deployment_id"] == deployments["compress/one-start"]
    assert run["parameters"]["overrides"] == {"finetune.steps": 7, "finetune.batch_size": 3}
    assert (run["parameters"]["commit"], run["parameters"]["limits"]) == ("main", {"fetch": 1})
    assert found.lines[0] == f"compress/one-start was started as {run['name']}"
    assert found.lines[1] == f"Look at it: {prefect_server.page}/runs/flow-run/{run['id']}"
    assert found.lines[2].startswith(f"Warning: no worker of the pool {POOL} is running, so the run waits; start one: ")


def test_images_are_drawn_or_checked_by_the_deployment_of_prefect_yaml(start):
    """Where they go and how many is added to what the file says; a check draws nothing."""
    (drawn,) = start("draw-start", "--param", "out=s3://bucket/digits", "--param", "num_images=1000000").runs
    options = "options={shard-size: 1000, labels: labels.txt}"
    (checked,) = start("draw/draw-start", "--param", "out=drawn", "--param", "check=true", "--param", options).runs

    assert drawn["parameters"] == {**DRAWN, "out": "s3://bucket/digits", "num_images": 1000000}
    assert checked["parameters"]["check"] is True
    assert checked["parameters"]["options"] == {"shard-size": 1000, "labels": "labels.txt"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one-strat"], "has no deployment 'one-strat'; did you mean one-start?"),
        (["compres/one-start"], "did you mean compress/one-start?"),
        (["nonsense"], "the server has no deployment 'nonsense'; it has "),
        (["twice-start"], "several deployments are named twice-start; give one of compress/twice-start, sweep/twice"),
        (["one-start", "--set", "prune.ratio=0.3"], "prune.ratio is not a known key; did you mean prune.target.ratio?"),
        (["one-start", "--set", "seed=1", "--param", "overrides={seed: 3}"], "both set overrides; give one of them"),
        (["one-start", "--param", "limits={fetch: soon}"], "limit fetch=soon: give minutes"),
        (["one-start", "--param", "comit=main"], "has no parameter 'comit'; did you mean commit?"),
        (["one-start", "--param", "limits=3"], "3 is not of type 'object'"),
        (["one-start", "--param", "commit"], "--param commit is not KEY=VALUE; write for example --param "),
        (["back-start", "--set", "seed=1", "--param", "why=x"], "takes no overrides of params.yaml; leave --set out"),
        (
            ["draw-start", "--param", "out=drawn", "--param", "num_images=0"],
            "field 'num_images'. Failure reason: 0 is less than or equal to the minimum",
        ),
        (["draw-start", "--param", "num_images=8"], "'out' is a required property"),
        (
            ["draw-start", "--param", "out=drawn", "--param", "format=png"],
            "'png' is not one of ['parquet', 'webdataset']",
        ),
        (["draw-start", "--param", "chek=true"], "has no parameter 'chek'; did you mean check?"),
        (["draw-start", "--set", "seed=1"], "takes no overrides of params.yaml; leave --set out"),
        (["back-start"], "'why' is a required property; give it with --param NAME=VALUE"),
    ],
)
def test_what_cannot_start_is_one_line(start, arguments, message):
    """No run is made."""
    found = start(*arguments)

    assert found.code == 1
    assert found.runs == []
    assert len(found.lines) == 1
    assert found.lines[0].startswith("Error: ")
    assert message in found.lines[0]


def scheduled_run(server, deployment):
    """Wait until a run of a deployment is scheduled, and return it."""
    query = {
        "deployments": {"id": {"any_": [deployment]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
    }
    (run,) = until(lambda: server.request("flow_runs/filter", query), every=0.05)
    return run


@pytest.mark.parametrize(("state", "code"), [("COMPLETED", 0), ("FAILED", 1), ("CANCELLED", 1)])
def test_a_run_is_followed_to_its_end(start, prefect_server, deployments, monkeypatch, state, code):
    """Each state is printed once, and the exit code is 0 only if the run completed."""
    monkeypatch.setattr(start_module, "POLL_S", 0.05)

    def end():
        run = scheduled_run(prefect_server, deployments["compress/twice-start"])
        for kind, message in (("RUNNING", None), (state, "seen\nby the test")):
            body = {"state": {"type": kind, "name": kind.title(), "message": message}, "force": True}
            prefect_server.request(f"flow_runs/{run['id']}/set_state", body)

    thread = threading.Thread(target=end)
    thread.start()
    found = start("compress/twice-start", "--wait")
    thread.join()
    (run,) = found.runs

    assert found.code == code
    assert found.lines[-1] == rf"{run['name']}: {state.title()}: seen\nby the test"
    assert len(set(found.lines)) == len(found.lines)


def test_tasks_of_one_name_are_told_apart(start, prefect_server, deployments, monkeypatch):
    """A sweep has two for its best cell, in different states: each state of each is printed once."""
    monkeypatch.setattr(start_module, "POLL_S", 0.05)

    def end():
        run = scheduled_run(prefect_server, deployments["compress/twice-start"])
        for number, kind in enumerate(("COMPLETED", "RUNNING")):
            body = {"flow_run_id": run["id"], "name": "cell", "task_key": "cell", "dynamic_key": str(number)}
            task = prefect_server.request("task_runs/", body)
            state = {"state": {"type": kind, "name": kind.title()}, "force": True}
            prefect_server.request(f"task_runs/{task['id']}/set_state", state)
        time.sleep(1)
        body = {"state": {"type": "COMPLETED", "name": "Completed"}, "force": True}
        prefect_server.request(f"flow_runs/{run['id']}/set_state", body)

    thread = threading.Thread(target=end)
    thread.start()
    lines = start("compress/twice-start", "--wait").lines
    thread.join()

    assert [lines.count(f"cell: {state}") for state in ("Completed", "Running")] == [1, 1]


def test_a_server_must_be_set(monkeypatch, root):
    """The message has the command that starts one."""
    monkeypatch.chdir(root)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    result = CliRunner().invoke(main, ["start", "compress"])

    assert result.exit_code == 1
    assert "PREFECT_API_URL is not set; start a server" in result.output
