"""prefect.yaml -> deployments on a real server; a file that would not run as written is refused before."""

import json
import shutil
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from ruamel.yaml import YAML

from flows import deploy as deploy_module
from flows.__main__ import main
from flows.deploy import LOST, schedule_states
from flows.deployments import Deployment, Schedule, read_deployments
from flows.workspaces.commands import CommandResult
from stages.runtime import telemetry
from stages.runtime.errors import InputError
from tests.orchestra import until
from tests.servers import ROOT
from tests.swift import free_ports

SILENT = {
    "name": "one",
    "entrypoint": "flows/compress.py:compress",
    "parameters": {"overrides": {"finetune.steps": 7}, "limits": {"fetch": 1}},
}
"""A correct deployment without a schedule."""
PAUSED = "Nothing runs at the times that are paused; to switch them on: espalier deploy --schedules"


@pytest.fixture(scope="module")
def pool(prefect_server):
    """A work pool made from its template; everything that was deployed to it is deleted in the end."""
    template = json.loads((ROOT / "flows" / "pools" / "process.json").read_text())
    body = {"name": "pool-deploy", "type": "process", "base_job_template": template}
    prefect_server.request("work_pools/", body)
    yield "pool-deploy"
    withdraw(prefect_server, "pool-deploy")
    for found in watchers(prefect_server):
        prefect_server.request(f"automations/{found['id']}", method="DELETE")


def withdraw(server, pool):
    """Delete the deployments of a pool."""
    for found in server.request("deployments/filter", {}):
        if found["work_pool_name"] == pool:
            server.request(f"deployments/{found['id']}", method="DELETE")


def watchers(server):
    """List the automations that crash lost runs."""
    return [found for found in server.request("automations/filter", {}) if found["name"] == LOST]


@pytest.fixture
def project(root, tmp_path, monkeypatch):
    """A folder with params.yaml, dvc.yaml and the flows, as the current folder."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(root / name, tmp_path / name)
    for name in ("flows", "recipes", "stages"):
        (tmp_path / name).symlink_to(root / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def deploy(monkeypatch, prefect_server):
    """Deploy a file to the server, or to another address: exit code and printed lines."""
    for name in ("PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW", *telemetry.OFF):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in prefect_server.client_environment().items():
        monkeypatch.setenv(name, value)

    def do(*options, url=prefect_server.uri):
        if url is None:
            monkeypatch.delenv("PREFECT_API_URL")
        else:
            monkeypatch.setenv("PREFECT_API_URL", url)
        settings = {PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: prefect_server.auth}
        with temporary_settings(settings):
            result = CliRunner().invoke(main, ["deploy", *options])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.output.splitlines()

    return do


@pytest.fixture
def names(prefect_server):
    """List the deployments that the server has."""
    return lambda: {it["name"] for it in prefect_server.request("deployments/filter", {})}


@pytest.fixture
def refused(project, deploy, names, pool, prefect_server):
    """Deploy a wrong file: the one line that is printed. The server has no new deployment."""

    def try_(content, *options, exit_code=1, **places):
        if isinstance(content, str):
            (project / "prefect.yaml").write_text(content)
        elif content is not None:
            YAML(typ="safe").dump(content, project / "prefect.yaml")
        before = names()
        code, lines = deploy(*options, **places)
        assert code == exit_code, lines
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
    ("content", "message"),
    [
        ("", "lists no deployments"),
        ("[]", "lists no deployments"),
        ("deployments: []", "lists no deployments"),
        ("deployments: {a: 1}", "lists no deployments"),
        ("name: [", "is not valid YAML"),
        ("a: 1\na: 2\n", "has the key a a second time in line 2"),
        ("deployments: [compress]", "needs a name and an entrypoint"),
        (with_one(entrypoint=None), "needs a name and an entrypoint such as flows/compress.py:compress"),
        (with_one(name=None), "needs a name and an entrypoint"),
        (with_one(entrypoint="flows/nowhere.py:compress"), "two: there is no flow flows/nowhere.py:compress"),
        (with_one(entrypoint="flows/compress.py:nothing"), "two: there is no flow flows/compress.py:nothing"),
        (with_one(entrypoint="flows/compress.py"), "two: there is no flow flows/compress.py"),
        (with_one(entrypoint="flows/compress.py:Any"), "two: there is no flow"),
        (with_one(schedules=[{"cron": "61 * * * *"}]), "two: invalid cron expression '61 * * * *'"),
        (with_one(schedules=[{"cron": "* * * *"}]), "two: invalid cron expression '* * * *'"),
        (with_one(schedules=[{"cron": ""}]), "two: invalid cron expression ''"),
        (with_one(schedules=[{"cron": "every day"}]), "two: invalid cron expression 'every day'"),
        (with_one(schedules=[{"cron": "0 0 30 2 *"}]), "two: invalid cron expression '0 0 30 2 *' (Bad day-of-month)"),
        (with_one(schedules=[{"cron": "0 0 31 4,6,9,11 *"}]), "two: invalid cron expression '0 0 31 4,6,9,11 *' (Bad"),
        (
            with_one(schedules=[{"cron": "0 2 * * *"}, {"cron": "0 0 30 2 *"}]),
            "two: invalid cron expression '0 0 30 2 *' (Bad day-of-month)",
        ),
        (with_one(parameters={"comit": "HEAD"}), "two: unknown parameter comit; the flow takes overrides, commit"),
        (with_one(parameters={"overrides": {"prune.ratio": 0.3}}), "prune.ratio is not a known key"),
        (with_one(parameters={"overrides": {"finetune.steps": "many"}}), "finetune.steps is 'many'"),
        (with_one(parameters={"preset": "nonsense"}), "two: there is no preset 'nonsense' in recipes/presets"),
        (with_one(parameters={"preset": "mnist", "overrides": {"seed": "x"}}), "mnist.yaml with seed=x: seed is 'x'"),
        (with_one(schedules=[{"cron": "0 2 * * *", "parameters": {"comit": "x"}}]), "unknown parameter comit"),
        (
            with_one(schedules=[{"interval": 60, "parameters": {"overrides": {"prune.ratio": 0.3}}}]),
            "two, schedule 60.0: params.yaml with prune.ratio=0.3: prune.ratio is not a known key",
        ),
        (
            with_one(
                entrypoint="flows/promotion.py:rollback", parameters={"name": "x"}, schedules=[{"cron": "0 2 * * *"}]
            ),
            "two, schedule 0 2 * * *: Validation failed",
        ),
        (with_one(entrypoint="flows/compare.py:compare", parameters={"rows": ["best"]}), "there is no row 'best'"),
        (with_one(entrypoint="flows/compare.py:compare", parameters={"seeds": [0, 0]}), "seeds are 0, 0; give one or"),
        (
            with_one(entrypoint="flows/compare.py:compare", parameters={"overrides": {"seed": 3}}),
            "seed is set by rows and seeds",
        ),
        (with_one(entrypoint="flows/compare.py:compare", parameters={"preset": "../x"}), "there is no preset '../x'"),
        (with_one(entrypoint="flows/sweep.py:sweep", parameters={"grid": {}}), "the grid has no cells"),
        (with_one(entrypoint="flows/sweep.py:sweep", parameters={"grid": {"seed": []}}), "the grid has no cells"),
        (with_one(entrypoint="flows/sweep.py:sweep", parameters={"grid": {"seed": [1, "b"]}}), "seed is 'b'"),
        (
            with_one(
                entrypoint="flows/sweep.py:sweep", parameters={"grid": {"fetch.model.name": ["digits", "photos"]}}
            ),
            "two: --grid fetch.model.name varies the dense model",
        ),
        (
            with_one(
                entrypoint="flows/sweep.py:sweep",
                parameters={"grid": {"prune.target.macs": ["44%"]}, "overrides": {"prune.target.macs": "56%"}},
            ),
            "two: --grid prune.target.macs would replace --set prune.target.macs",
        ),
        (with_one(schedules=[{"interval": 3600, "anchor_date": "never"}]), "two: invalid schedule (1 validation error"),
        (with_one(schedules=[{"cron": "0 2 * * *", "anchor_date": "2026-01-01"}]), "two: invalid schedule (1 validat"),
    ],
)
def test_what_would_never_run_is_refused(refused, content, message):
    """One line names the deployment, and nothing of the file is deployed, not even its correct entries."""
    assert message in refused(content)


SWEEP = "flows/sweep.py:sweep"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 3}, "deployments.1.name is 3: input should be a valid string"),
        ({"name": "a/b"}, "deployments.1.name is 'a/b': string should match pattern"),
        ({"entrypoint": 3}, "deployments.1.entrypoint is 3: input should be a valid string"),
        ({"entrypoint": "../x.py:compress"}, "deployments.1.entrypoint is '../x.py:compress': string should match"),
        ({"entrypoint": "./nowhere.py:compress"}, "deployments.1.entrypoint is './nowhere.py:compress': string should"),
        ({"entrypoint": "broken.py:compress"}, "two: there is no flow broken.py:compress (invalid syntax"),
        ({"parameters": "commit"}, "deployments.1.parameters is 'commit': write a block"),
        ({"parameters": ["commit"]}, "deployments.1.parameters is ['commit']: write a block"),
        ({"parameters": {1: 2, "comit": 3}}, "deployments.1.parameters.1.[key] is 1: input should be a valid string"),
        ({"parameters": {"overrides": "seed"}}, "two: Validation failed for field 'overrides'"),
        ({"parameters": {"overrides": ["seed"]}}, "two: Validation failed for field 'overrides'"),
        ({"parameters": {"overrides": {1: 2}}}, "two: keys of overrides and grid are text; write them as prune."),
        ({"parameters": {"limits": "none"}}, "two: Validation failed for field 'limits'"),
        ({"parameters": {"limits": {"fintune": 5}}}, "two: limit fintune: no such stage; the stages are code, fetch, "),
        ({"parameters": {"limits": {"finetune": 0}}}, "two: limit finetune=0: give minutes above 0"),
        ({"entrypoint": SWEEP, "parameters": {"grid": "seed"}}, "two: Validation failed for field 'grid'"),
        ({"entrypoint": SWEEP, "parameters": {"grid": ["seed"]}}, "two: Validation failed for field 'grid'"),
        ({"entrypoint": SWEEP, "parameters": {"grid": None}}, "two: Validation failed for field 'grid'"),
        ({"entrypoint": SWEEP, "parameters": {"grid": {1: [2]}}}, "two: keys of overrides and grid are text"),
        (
            {"entrypoint": SWEEP, "parameters": {"grid": {"seed": [1]}, "runner": "sloth"}},
            "two: Validation failed for field 'runner'",
        ),
        (
            {"entrypoint": SWEEP, "parameters": {"grid": {"seed": [1]}, "jobs": "many"}},
            "two: Validation failed for field 'jobs'",
        ),
        ({"paramters": {"commit": "HEAD"}}, "deployments.1.paramters is not a known key; did you mean"),
        ({"work_pool": "espalier"}, "deployments.1.work_pool is 'espalier': write a block"),
        ({"work_pool": ["espalier"]}, "deployments.1.work_pool is ['espalier']: write a block"),
        ({"schedules": "daily"}, "deployments.1.schedules is 'daily': write a list"),
        ({"schedules": ["daily"]}, "deployments.1.schedules.0 is 'daily': write a block"),
        ({"schedules": [None]}, "deployments.1.schedules.0 is None: write a block"),
        ({"schedules": {"cron": "0 2 * * *"}}, "deployments.1.schedules: write a list"),
        ({"schedules": [{"corn": "0 2 * * *"}]}, "deployments.1.schedules.0.corn is not a known key; did you mean"),
        ({"schedules": [{}]}, "two: give exactly one of cron, interval, rrule in a schedule"),
        ({"schedules": [{"cron": "0 2 * * *", "interval": 60}]}, "two: give exactly one of cron, interval, rrule in"),
        # Prefect reads this with the seconds last, others first.
        ({"schedules": [{"cron": "0 0 2 * * *"}]}, "two: invalid cron expression '0 0 2 * * *': expected minute hour"),
        ({"schedules": [{"cron": "0 2 LW * *"}]}, "two: invalid schedule (1 validation error for CronSchedule cron"),
        (  # a fifth Sunday on the first of a month
            {"schedules": [{"cron": "0 0 */31 * 0#5"}]},
            "two: cron expression '0 0 */31 * 0#5' never fires, since no such day exists; correct it",
        ),
        (
            {"schedules": [{"cron": "0 2 * * *", "timezone": "No/Where"}]},
            "two: invalid schedule (1 validation error for CronSchedule timezone",
        ),
        ({"schedules": [{"interval": -5}]}, "deployments.1.schedules.0.interval is -5: input should be greater than 0"),
        ({"schedules": [{"rrule": "nonsense"}]}, "two: invalid schedule (1 validation error for RRuleSchedule rrule"),
    ],
    ids=str,
)
def test_what_is_of_another_form_is_refused(refused, project, pool, monkeypatch, changes, message):
    """No request is sent, so that nothing of the file is deployed; the message names or counts the deployment."""
    (project / "broken.py").write_text("def (:")
    monkeypatch.syspath_prepend(project)  # as python -m does

    assert refused(with_one(**changes), "--pool", pool).startswith(f"Error: prefect.yaml: {message}")


def test_two_deployments_of_one_flow_need_two_names(refused, pool):
    """Prefect would silently replace the first by the second."""
    line = refused({"deployments": [SILENT, deepcopy(SILENT)]}, "--pool", pool)
    assert line == (
        "Error: prefect.yaml: one of flows/compress.py:compress is listed twice; give each a name of its own"
    )


@pytest.mark.usefixtures("project")
def test_no_file_is_one_line(refused):
    """The message names it."""
    assert "prefect.yaml: No such file or directory" in refused(None)
    assert "no.yaml: No such file or directory" in refused(None, "--file", "no.yaml")


def test_an_unknown_pool_is_refused_with_its_remedy(refused):
    """Prefect itself would deploy to it silently, and nothing would ever run."""
    line = refused(with_one(), "--pool", "nowhere")
    assert line == (
        "Error: the server has no work pool 'nowhere'; make it: prefect work-pool create nowhere --type process "
        "--base-job-template flows/pools/process.json"
    )


def test_an_unknown_pool_of_one_deployment_is_refused(refused, pool):
    """The file's pool counts for its deployment, and the option for the others."""
    assert "has no work pool 'elsewhere'" in refused(with_one(work_pool={"name": "elsewhere"}), "--pool", pool)


def test_what_prefect_refuses_is_one_line(project, monkeypatch):
    """Such as a step of `pull` that it does not know; its last lines say which."""
    YAML(typ="safe").dump(with_one(), project / "prefect.yaml")
    result = CommandResult(1, ("Deploying", "a", "b", "no module named nowhere"))
    monkeypatch.setattr(deploy_module, "run", lambda *_, **__: result)

    with pytest.raises(InputError, match=r"^Prefect refused prefect\.yaml: a b no module named nowhere$"):
        deploy_module._create_deployments(Path("prefect.yaml"), None, [[], []])


def test_a_server_must_be_set(refused):
    """Without an address, a server would be started for this command alone and be gone after it."""
    line = refused(with_one(), url=None)
    assert line == "Error: PREFECT_API_URL is not set; start a server (espalier server) and set it"


def test_a_server_that_does_not_answer(refused):
    """No server listens at that port: an outage. The message names the address."""
    (port,) = free_ports(1)
    line = refused(with_one(), url=f"http://127.0.0.1:{port}/api", exit_code=75)
    assert line.startswith(f"Error: the Prefect server http://127.0.0.1:{port}/api does not answer: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("/api", ""), "; correct PREFECT_API_URL (http://HOST:PORT/api)"),
        (("/api", "/other"), "; correct PREFECT_API_URL (http://HOST:PORT/api)"),
        (("http:", "htp:"), "PREFECT_API_URL does not begin with a scheme that is allowed"),
        ((":", ""), "PREFECT_API_URL does not begin with a scheme that is allowed"),
    ],
    ids=str,
)
def test_an_address_that_is_not_the_servers_is_a_mistake(refused, prefect_server, change, message):
    """The server's page instead of its API, a path that it does not have, another scheme, and none."""
    assert message in refused(with_one(), url=prefect_server.uri.replace(*change, 1))


def test_a_wrong_password_is_a_mistake(deploy, project, pool, prefect_server, monkeypatch):
    """A server that refuses the user is not away."""
    YAML(typ="safe").dump(with_one(), project / "prefect.yaml")
    with monkeypatch.context() as patch:
        patch.setattr(prefect_server, "auth", "me:wrong")  # pragma: allowlist secret
        code, lines = deploy("--pool", pool)

    assert code == 1
    assert len(lines) == 1, lines
    assert "refuses the password in PREFECT_API_AUTH_STRING" in lines[0]


def test_a_password_in_the_servers_address_is_not_printed(refused):
    """The server's address without it is."""
    (port,) = free_ports(1)
    line = refused(with_one(), url=f"http://me:hunter2@127.0.0.1:{port}/api", exit_code=75)

    assert f"127.0.0.1:{port}/api does not answer" in line
    assert "hunter2" not in line


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": ["noise", "taylor"], "overrides": {"importance.stride": 10}}, None),
        (
            {"overrides": {"prune.ranking": "global"}},
            "prune.ranking global with prune.geglu pairs gives each seed other",
        ),
        ({"rows": ["mine"], "recipes": {"mine": {"finetune.loss.output": 1}}, "steps": [5, 10]}, None),
        ({"rows": ["noise", "tailor"]}, "there is no row 'tailor'"),
        ({"rows": ["noise", "taylor"], "overrides": {"prune.ranking": "global"}}, "prune.ranking is set by rows and"),
        ({"steps": [5]}, "--steps 5: give two or more rising numbers"),
    ],
)
def test_a_deployment_of_curves_takes_recipes_and_methods(project, given, message):
    """By the rules of the command; beside a method recipes prune uniformly, too."""
    entry = {"name": "one", "entrypoint": "flows/curve.py:curve", "parameters": {"preset": "digits", **given}}
    YAML(typ="safe").dump({"deployments": [entry]}, project / "prefect.yaml")
    if message is None:
        assert [it.name for it in read_deployments(project / "prefect.yaml")] == ["one"]
    else:
        with pytest.raises(InputError, match=message):
            read_deployments(project / "prefect.yaml")


def test_every_stage_ends_at_some_time():
    """A stage without a limit would hold a worker for ever; `code` reads a few files."""
    yaml = YAML(typ="safe")
    stages = yaml.load((ROOT / "dvc.yaml").read_text())["stages"].keys() - {"code"}
    deployments = yaml.load((ROOT / "prefect.yaml").read_text())["deployments"]
    limits = [it["parameters"]["limits"] for it in deployments if "limits" in it["parameters"]]

    assert len(limits) > 1
    assert all(found.keys() == stages for found in limits)


def test_the_file_of_the_project_is_deployed_as_it_is(root, monkeypatch, prefect_server, deploy, pool, names):
    """Every deployment, on the chosen pool, with its schedule, from which the server makes runs once it is on.

    Schedules are paused until --schedules; deployed again, they are as they were, and one automation crashes lost runs.
    """
    monkeypatch.chdir(root)
    monkeypatch.delenv("ESPALIER_CODE", raising=False)
    expected = YAML(typ="safe").load((root / "prefect.yaml").read_text())["deployments"]
    text = (root / "prefect.yaml").read_bytes()

    for options, on in (((), False), (("--schedules",), True), ((), True)):
        code, lines = deploy("--pool", pool, *options)
        assert (code, len(lines)) == (0, len(expected) + (not on)), lines
        assert lines[len(expected) :] == ([] if on else [PAUSED])
        printed = dict(line.split(": ") for line in lines[: len(expected)])

        assert names() >= {it["name"] for it in expected}
        for entry in expected:
            name = f"{entry['entrypoint'].rpartition(':')[2]}/{entry['name']}"
            found = prefect_server.request(f"deployments/name/{name}")
            assert found["work_pool_name"] == pool
            assert found["parameters"] == entry["parameters"]
            assert found["tags"] == entry["tags"]
            assert found["pull_steps"] == [
                {"prefect.deployments.steps.set_working_directory": {"directory": str(root)}}
            ]
            crons = [it["cron"] for it in entry.get("schedules", [])]
            assert [it["schedule"]["cron"] for it in found["schedules"]] == crons
            assert [it["active"] for it in found["schedules"]] == [on] * len(crons)
            assert printed[name] == (f"at {crons[0]}{'' if on else ', paused'}" if crons else "on request")
            query = {"deployments": {"id": {"any_": [found["id"]]}}}
            assert not (crons and on) or until(lambda query=query: prefect_server.request("flow_runs/count", query), 30)
            assert on or not prefect_server.request("flow_runs/count", query)
    assert len(watchers(prefect_server)) == 1
    assert (root / "prefect.yaml").read_bytes() == text


CRON, INTERVAL = {"cron": "0 2 * * *"}, {"interval": 3600.0}


@pytest.mark.parametrize("key", [{}, {"slug": "night"}])
@pytest.mark.parametrize("times", [CRON, INTERVAL])
def test_a_schedule_that_is_on_stays_on(key, times):
    """It is found by its slug, else by its times; one that the file pauses is never on."""
    schedule, paused = Schedule(**times, **key), Schedule(**times, **key, active=False)
    entry = Deployment(name="one", entrypoint="flows/compress.py:compress", schedules=[schedule, paused])
    same = CronSchedule(**times) if "cron" in times else IntervalSchedule(interval=timedelta(hours=1))

    def states(*existing, with_schedules=False):
        found = SimpleNamespace(schedules=[SimpleNamespace(slug=key.get("slug"), **it) for it in existing])
        client = SimpleNamespace(read_deployment_by_name=lambda name: {"compress/one": found}[name])
        return schedule_states(entry, client, with_schedules=with_schedules)

    assert states({"schedule": same, "active": True}) == [True, False]
    assert states({"schedule": same, "active": False}) == [False, False]
    assert states() == [False, False]
    assert states(with_schedules=True) == [True, False]
    changed = CronSchedule(cron="0 3 * * *")
    assert states({"schedule": changed, "active": True}) == [bool(key), False]
