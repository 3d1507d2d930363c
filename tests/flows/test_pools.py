"""The base job templates of the work pools: complete, checked by Prefect's own means, and without secrets."""

import json
import os
import re
import subprocess
import sys

import pytest
from prefect.server.schemas.actions import WorkPoolCreate
from prefect.utilities.schema_tools.validation import ValidationError, is_valid_schema, validate
from prefect.utilities.templating import PlaceholderType, apply_values, find_placeholders

KINDS = ["docker", "kubernetes", "process"]
PLACES = {
    "ESPALIER_HOME": "/var/lib/espalier",
    "PREFECT_CLIENT_MAX_RETRIES": "8",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "PREFECT_HOME": "/tmp/prefect",
}
PROJECT = """
name: probe
deployments:
  - name: one
    entrypoint: probe.py:probe
    work_pool:
      name: {pool}
      job_variables: {{env: {{PROBE: arrived}}}}
"""
FLOW = '''
import os
from pathlib import Path

from prefect import flow


@flow
def probe():
    """Write a variable of the environment to a file."""
    Path("found").write_text(os.environ["PROBE"])
'''


@pytest.fixture
def template(root):
    """Read the template of a type of pool."""
    return lambda kind: json.loads((root / "flows" / "pools" / f"{kind}.json").read_text())


@pytest.fixture
def render(template):
    """Render a template with its defaults and a deployment's own values, as a worker does."""

    def fill(kind, **values):
        read = template(kind)
        return apply_values(read["job_configuration"], defaults(read) | values)

    return fill


def defaults(template):
    """Return the default of every variable that has one."""
    variables = template["variables"]["properties"]
    return {name: variable["default"] for name, variable in variables.items() if "default" in variable}


@pytest.mark.parametrize("kind", KINDS)
def test_the_server_accepts_a_template(template, kind):
    """It is a schema, and Prefect accepts it for a pool."""
    is_valid_schema(template(kind)["variables"], preprocess=False)

    assert WorkPoolCreate(name="a-pool", type=kind, base_job_template=template(kind)).base_job_template


@pytest.mark.parametrize("kind", KINDS)
def test_placeholders_and_variables_are_the_same(template, kind):
    """Every placeholder has a variable, and every variable a placeholder."""
    found = find_placeholders(template(kind)["job_configuration"])

    assert {placeholder.name for placeholder in found} == template(kind)["variables"]["properties"].keys()
    assert {placeholder.type for placeholder in found} == {PlaceholderType.STANDARD}


@pytest.mark.parametrize("kind", KINDS)
def test_a_deployment_needs_no_job_variables(template, render, kind):
    """Every variable has an allowed default, and the defaults fill every placeholder."""
    variables = template(kind)["variables"]
    validate(defaults(template(kind)), variables, raise_on_error=True, preprocess=False)

    assert defaults(template(kind)).keys() == variables["properties"].keys()
    assert find_placeholders(render(kind, env={})) == set()


@pytest.mark.parametrize("kind", KINDS)
def test_a_variable_is_described(template, kind):
    """The form of the user interface shows title and description."""
    for name, variable in template(kind)["variables"]["properties"].items():
        assert {"title", "description"} <= variable.keys(), name


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("docker", {"mem_limit": "8 GB"}),
        ("docker", {"device_requests": [{"count": 1}]}),
        ("docker", {"nano_cpus": 1.5}),
        ("docker", {"image_pull_policy": "Sometimes"}),
        ("kubernetes", {"gpus": "2"}),
        ("kubernetes", {"gpus": -1}),
        ("kubernetes", {"gpus": 0.5}),
        ("kubernetes", {"env": {"NUMBER": 1}}),
        ("process", {"stream_output": "yes"}),
    ],
)
def test_a_wrong_value_is_refused(template, kind, values):
    """Prefect checks it when a deployment is made, not when its first run starts."""
    with pytest.raises(ValidationError):
        validate(values, template(kind)["variables"], raise_on_error=True, preprocess=False)


@pytest.mark.parametrize("kind", KINDS)
def test_no_secret_is_in_a_template(template, kind):
    """Settings of servers are references to variables; the pool keeps their names alone."""
    for name, value in defaults(template(kind))["env"].items():
        assert value == PLACES.get(name, f"{{{{ ${name} }}}}")


def test_a_container_gets_secrets_from_the_worker(template, monkeypatch):
    """References are resolved when a run starts; a variable that the worker lacks is empty."""
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "of the worker")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    env = apply_values(defaults(template("docker"))["env"], {})

    found = [env[name] for name in ("MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY")]
    assert found == ["of the worker", ""]


def test_a_container_gets_what_the_docs_promise_of_the_worker(template, monkeypatch):
    """Whom to notify, and what a reproduction may clone and read."""
    promised = [f"ESPALIER_{name}" for name in ("NOTIFY", "REMOTES", "EXTRA_VARIABLES", "STORE")]
    for name in promised:
        monkeypatch.setenv(name, f"{name} of the worker")
    env = apply_values(defaults(template("docker"))["env"], {})

    assert {name: env.get(name) for name in promised} == {name: f"{name} of the worker" for name in promised}


@pytest.mark.parametrize("given", [None, "", "of the worker"])
def test_an_empty_variable_keeps_the_images_default(root, given):
    """The image's entry point sets it before the command starts, whose arguments stay as they are."""
    text = (root / "Dockerfile").read_text().replace("\\\n", "")
    expected = dict(re.findall(r" (ESPALIER_REPOSITORY|MLFLOW_TRACKING_URI)=(\S+)", text))
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    environment = {"PATH": os.environ["PATH"], **({} if given is None else dict.fromkeys(expected, given))}
    code = "import json, os, sys; print(json.dumps([dict(os.environ), sys.argv[1:]]))"
    command = [*json.loads(entry), sys.executable, "-c", code, "two words", "$HOME"]
    variables, arguments = json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)

    assert {name: variables[name] for name in expected} == (dict.fromkeys(expected, given) if given else expected)
    assert arguments == ["two words", "$HOME"]


def test_a_container_gets_gpus(render):
    """By default no GPU is requested, since a machine without one would refuse the container."""
    two = [{"count": 2, "capabilities": [["gpu"]]}]

    assert render("docker")["container_create_kwargs"]["device_requests"] == []
    assert render("docker", device_requests=two)["container_create_kwargs"]["device_requests"] == two


def test_a_job_gets_gpus(render):
    """Requests and limits are equal numbers, as Kubernetes requires of devices."""
    for gpus in (0, 2):
        (container,) = pod_of(render("kubernetes", gpus=gpus))["containers"]
        assert [container["resources"][key]["nvidia.com/gpu"] for key in ("limits", "requests")] == [gpus, gpus]


def test_a_job_is_never_repeated_by_kubernetes(render):
    """Prefect reschedules it when its node fails, and it has a minute to end."""
    manifest = render("kubernetes")["job_manifest"]

    assert (manifest["spec"]["backoffLimit"], pod_of(render("kubernetes"))["restartPolicy"]) == (0, "Never")
    assert pod_of(render("kubernetes"))["terminationGracePeriodSeconds"] == 60


def test_a_job_has_secret_and_home(render):
    """The secret's keys become variables, and the claim is mounted at ESPALIER_HOME."""
    pod = pod_of(render("kubernetes", secret="a-secret", claim="a-claim"))
    (container,) = pod["containers"]

    assert container["envFrom"] == [{"secretRef": {"name": "a-secret"}}]
    assert {"name": "home", "persistentVolumeClaim": {"claimName": "a-claim"}} in pod["volumes"]
    assert {"name": "home", "mountPath": container["env"]["ESPALIER_HOME"]} in container["volumeMounts"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_server_keeps_a_template_unchanged(prefect_server, template, tmp_path, kind):
    """A pool of each type is made from its file."""
    name = f"{kind}-{tmp_path.name}"
    made = prefect_server.request("work_pools/", {"name": name, "type": kind, "base_job_template": template(kind)})

    assert made["base_job_template"] == template(kind)
    assert prefect_server.request(f"work_pools/{name}")["type"] == kind


@pytest.mark.e2e
def test_a_process_runs_in_its_pool(prefect_server, worker, root, tmp_path):
    """A worker runs a deployment in the project's folder, with the deployment's environment."""
    file, pool = root / "flows" / "pools" / "process.json", f"pool-{tmp_path.name}"
    made = prefect_server.cli("work-pool", "create", pool, "--type", "process", "--base-job-template", str(file))
    assert made.returncode == 0, made.stdout
    (tmp_path / "prefect.yaml").write_text(PROJECT.format(pool=pool))
    (tmp_path / "probe.py").write_text(FLOW)
    deployed = prefect_server.cli("--no-prompt", "deploy", "--all", cwd=tmp_path)
    assert deployed.returncode == 0, deployed.stdout

    worker(tmp_path, pool=pool)
    run = prefect_server.submit("probe/one")

    assert prefect_server.wait(run) == "Completed", prefect_server.lines(run)
    assert (tmp_path / "found").read_text() == "arrived"


def pod_of(configuration):
    """Find the pod in a rendered configuration."""
    return configuration["job_manifest"]["spec"]["template"]["spec"]
