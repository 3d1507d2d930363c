"""prefect.yaml -> deployments on a real server; what would never run, or not as it is written, is refused before."""

import json
import shutil
from copy import deepcopy

import pytest
from click.testing import CliRunner
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from ruamel.yaml import YAML

from flows.__main__ import SETTINGS, main
from flows.deploy import LOST
from stages.runtime import telemetry
from tests.orchestra import until
from tests.servers import ROOT
from tests.swift import free_ports

SILENT = {
    "name": "one",
    "entrypoint": "flows/compress.py:compress",
    "parameters": {"overrides": {"finetune.steps": 7}, "limits": {"fetch": 1}},
}
"""A deployment that is fine, and asks for no runs."""


@pytest.fixture(scope="module")
def pool(prefect_server):
    """A work pool as its template makes it, and nothing that was deployed to it is left in the end."""
    template = json.loads((ROOT / "flows" / "pools" / "process.json").read_text())
    body = {"name": "pool-deploy", "type": "process", "base_job_template": template}
    prefect_server.ask("work_pools/", body)
    yield "pool-deploy"
    withdraw(prefect_server, "pool-deploy")
    for found in watchers(prefect_server):
        prefect_server.ask(f"automations/{found['id']}", method="DELETE")


def withdraw(server, pool):
    """Delete the deployments of a pool."""
    for found in server.ask("deployments/filter", {}):
        if found["work_pool_name"] == pool:
            server.ask(f"deployments/{found['id']}", method="DELETE")


def watchers(server):
    """List what ends lost runs."""
    return [found for found in server.ask("automations/filter", {}) if found["name"] == LOST]


@pytest.fixture
def project(root, tmp_path, monkeypatch):
    """A folder with params.yaml, dvc.yaml and the flows, which we are in."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(root / name, tmp_path / name)
    for name in ("flows", "recipes", "stages"):
        (tmp_path / name).symlink_to(root / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def deploy(monkeypatch, prefect_server):
    """Deploy a file to the server, or to wherever told: exit code and the lines that were said."""
    for name in (*SETTINGS, *telemetry.OFF):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in prefect_server.client_environment().items():
        monkeypatch.setenv(name, value)

    def do(*options, url=prefect_server.uri):
        if url is None:
            monkeypatch.delenv("PREFECT_API_URL")
        settings = {PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: prefect_server.auth}
        with temporary_settings(settings):
            result = CliRunner().invoke(main, ["deploy", *options])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output.splitlines()

    return do


@pytest.fixture
def names(prefect_server):
    """List the deployments that the server has."""
    return lambda: {it["name"] for it in prefect_server.ask("deployments/filter", {})}


@pytest.fixture
def refused(project, deploy, names, pool, prefect_server):
    """Deploy what cannot be: the one line that is said of it. The server has nothing more than before."""

    def try_(content, *options, **places):
        if isinstance(content, str):
            (project / "prefect.yaml").write_text(content)
        elif content is not None:
            YAML(typ="safe").dump(content, project / "prefect.yaml")
        before = names()
        code, lines = deploy(*options, **places)
        assert code == 1
        assert len(lines) == 1, lines
        assert lines[0].startswith("Error: ")
        assert names() == before
        return lines[0]

    yield try_
    withdraw(prefect_server, pool)


def with_one(**changes):
    """A file with two deployments, of which the second is changed; a key that is None goes."""
    entry = deepcopy(SILENT) | {"name": "two"} | changes
    return {"deployments": [deepcopy(SILENT), {key: value for key, value in entry.items() if value is not None}]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "lists no deployments"),
        ("[]", "lists no deployments"),
        ("deployments: []", "lists no deployments"),
        ("deployments: {a: 1}", "lists no deployments"),
        ("name: [", "is not valid YAML"),
        ("a: 1\na: 2\n", "is not valid YAML"),
        ("deployments: [compress]", "needs a name and an entrypoint"),
        (with_one(entrypoint=None), "needs a name and an entrypoint such as flows/compress.py:compress"),
        (with_one(name=None), "needs a name and an entrypoint"),
        (with_one(entrypoint="flows/nowhere.py:compress"), "two: there is no flow flows/nowhere.py:compress"),
        (with_one(entrypoint="flows/compress.py:nothing"), "two: there is no flow flows/compress.py:nothing"),
        (with_one(entrypoint="flows/compress.py"), "two: there is no flow flows/compress.py"),
        (with_one(entrypoint="flows/compress.py:Any"), "two: there is no flow"),
        (with_one(schedules=[{"cron": "61 * * * *"}]), "two: cron '61 * * * *' is none"),
        (with_one(schedules=[{"cron": "* * * *"}]), "two: cron '* * * *' is none"),
        (with_one(schedules=[{"cron": ""}]), "two: cron '' is none"),
        (with_one(schedules=[{"cron": "every day"}]), "two: cron 'every day' is none"),
        (with_one(schedules=[{"cron": "0 0 30 2 *"}]), "two: cron '0 0 30 2 *'"),
        (with_one(schedules=[{"cron": "0 0 31 4,6,9,11 *"}]), "two: cron '0 0 31 4,6,9,11 *'"),
        (with_one(schedules=[{"cron": "0 2 * * *"}, {"cron": "0 0 30 2 *"}]), "two: cron '0 0 30 2 *'"),
        (with_one(parameters={"comit": "HEAD"}), "two: comit is no parameter of its flow; it takes overrides, commit"),
        (with_one(parameters={"overrides": {"prune.ratio": 0.3}}), "prune.ratio is not a known key"),
        (with_one(parameters={"overrides": {"finetune.steps": "many"}}), "finetune.steps is 'many'"),
        (with_one(parameters={"preset": "nonsense"}), "two: there is no preset 'nonsense' in recipes/presets"),
        (with_one(parameters={"preset": "mnist", "overrides": {"seed": "x"}}), "mnist.yaml with seed=x: seed is 'x'"),
        (with_one(entrypoint="flows/compare.py:compare", parameters={"rows": ["best"]}), "there is no row 'best'"),
        (with_one(entrypoint="flows/compare.py:compare", parameters={"seeds": [0, 0]}), "seeds are 0, 0; give one or"),
        (with_one(entrypoint="flows/compare.py:compare", parameters={"overrides": {"seed": 3}}), "what rows and seeds"),
        (with_one(entrypoint="flows/compare.py:compare", parameters={"preset": "../x"}), "there is no preset '../x'"),
        (with_one(entrypoint="flows/sweep.py:sweep", parameters={"grid": {}}), "the grid has no cells"),
        (with_one(entrypoint="flows/sweep.py:sweep", parameters={"grid": {"seed": []}}), "the grid has no cells"),
        (with_one(entrypoint="flows/sweep.py:sweep", parameters={"grid": {"seed": [1, "b"]}}), "seed is 'b'"),
    ],
)
def test_what_would_never_run_is_refused(refused, content, words):
    """In one line that names the deployment, and nothing of the file is deployed, not even what is fine."""
    assert words in refused(content)


SWEEP = "flows/sweep.py:sweep"


@pytest.mark.parametrize(
    "changes",
    [
        {"name": 3},
        {"name": "a/b"},
        {"entrypoint": 3},
        {"entrypoint": "../x.py:compress"},
        {"entrypoint": "./nowhere.py:compress"},
        {"entrypoint": "broken.py:compress"},
        {"parameters": "commit"},
        {"parameters": ["commit"]},
        {"parameters": {1: 2, "comit": 3}},
        {"parameters": {"overrides": "seed"}},
        {"parameters": {"overrides": ["seed"]}},
        {"parameters": {"overrides": {1: 2}}},
        {"parameters": {"limits": "none"}},
        {"parameters": {"limits": {"fintune": 5}}},
        {"parameters": {"limits": {"finetune": 0}}},
        {"entrypoint": SWEEP, "parameters": {"grid": "seed"}},
        {"entrypoint": SWEEP, "parameters": {"grid": ["seed"]}},
        {"entrypoint": SWEEP, "parameters": {"grid": None}},
        {"entrypoint": SWEEP, "parameters": {"grid": {1: [2]}}},
        {"entrypoint": SWEEP, "parameters": {"grid": {"seed": [1]}, "runner": "sloth"}},
        {"entrypoint": SWEEP, "parameters": {"grid": {"seed": [1]}, "jobs": "many"}},
        {"paramters": {"commit": "HEAD"}},
        {"work_pool": "espalier"},
        {"work_pool": ["espalier"]},
        {"schedules": "daily"},
        {"schedules": ["daily"]},
        {"schedules": [None]},
        {"schedules": {"cron": "0 2 * * *"}},
        {"schedules": [{"corn": "0 2 * * *"}]},
        {"schedules": [{"cron": "0 0 2 * * *"}]},  # which Prefect reads with the seconds last, others first
        {"schedules": [{"cron": "0 2 LW * *"}]},  # which Prefect does not know
        {"schedules": [{"cron": "0 2 * * *", "timezone": "No/Where"}]},
        {"schedules": [{"interval": -5}]},
        {"schedules": [{"rrule": "nonsense"}]},
    ],
    ids=str,
)
def test_what_is_of_another_form_is_refused(refused, project, pool, monkeypatch, changes):
    """Before the server is asked, so that nothing of the file is deployed; the deployment is named or counted."""
    (project / "broken.py").write_text("def (:")
    monkeypatch.syspath_prepend(project)  # as python -m does
    told = refused(with_one(**changes), "--pool", pool)

    assert told.startswith("Error: prefect.yaml: ")
    assert any(word in told for word in ("two", "deployments.1", str(changes.get("name", "two"))))


def test_two_deployments_of_one_flow_need_two_names(refused, pool):
    """The second would take the place of the first without a word."""
    assert "one" in refused({"deployments": [SILENT, deepcopy(SILENT)]}, "--pool", pool)


@pytest.mark.usefixtures("project")
def test_no_file_is_one_line(refused):
    """With its name."""
    assert "prefect.yaml: No such file or directory" in refused(None)
    assert "no.yaml: No such file or directory" in refused(None, "--file", "no.yaml")


def test_an_unknown_pool_is_refused_with_its_remedy(refused):
    """Prefect itself would deploy to it without a word, and nothing would ever run."""
    told = refused(with_one(), "--pool", "nowhere")
    assert told == (
        "Error: the server has no work pool 'nowhere'; make it: prefect work-pool create nowhere --type process "
        "--base-job-template flows/pools/process.json"
    )


def test_an_unknown_pool_of_one_deployment_is_refused(refused, pool):
    """The file's word counts for its deployment, and the option for the others."""
    assert "has no work pool 'elsewhere'" in refused(with_one(work_pool={"name": "elsewhere"}), "--pool", pool)


def test_no_server_is_named(refused):
    """Without an address, a server would be started for this command alone and be gone after it."""
    told = refused(with_one(), url=None)
    assert told == "Error: no Prefect server is named; start one (prefect server start) and set PREFECT_API_URL"


def test_a_server_that_does_not_answer(refused):
    """Nobody listens at that port; the address is told."""
    (port,) = free_ports(1)
    told = refused(with_one(), url=f"http://127.0.0.1:{port}/api")
    assert told.startswith(f"Error: the Prefect server http://127.0.0.1:{port}/api does not answer: ")


def test_a_password_in_the_servers_address_is_not_told(refused):
    """The server's name is."""
    (port,) = free_ports(1)
    told = refused(with_one(), url=f"http://me:hunter2@127.0.0.1:{port}/api")

    assert f"127.0.0.1:{port}/api does not answer" in told
    assert "hunter2" not in told


def test_the_file_of_the_project_is_deployed_as_it_is(root, monkeypatch, prefect_server, deploy, pool, names):
    """Every deployment, on the pool that was asked for, with its schedule, from which the server makes runs.

    Deployed again, it is the same, and lost runs are still watched for once.
    """
    monkeypatch.chdir(root)
    monkeypatch.delenv("ESPALIER_CODE", raising=False)
    expected = YAML(typ="safe").load((root / "prefect.yaml").read_text())["deployments"]

    for _ in range(2):
        code, lines = deploy("--pool", pool)
        assert (code, len(lines)) == (0, len(expected)), lines
    told = dict(line.split(": ") for line in lines)

    assert names() >= {it["name"] for it in expected}
    for entry in expected:
        name = f"{entry['entrypoint'].rpartition(':')[2]}/{entry['name']}"
        found = prefect_server.ask(f"deployments/name/{name}")
        assert found["work_pool_name"] == pool
        assert found["parameters"] == entry["parameters"]
        assert found["tags"] == entry["tags"]
        assert found["pull_steps"] == [{"prefect.deployments.steps.set_working_directory": {"directory": str(root)}}]
        crons = [it["cron"] for it in entry.get("schedules", [])]
        assert [it["schedule"]["cron"] for it in found["schedules"]] == crons
        assert told[name] == (f"at {crons[0]}" if crons else "when it is asked for")
        asked = {"deployments": {"id": {"any_": [found["id"]]}}}
        assert not crons or until(lambda asked=asked: prefect_server.ask("flow_runs/count", asked), 30)
    assert len(watchers(prefect_server)) == 1
