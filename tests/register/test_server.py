"""The server of mlflow/serve: authentication, permissions, persistence, secrets."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from stages.register.registry import Registry
from tests.servers import Mlflow, s3_client
from tests.swift import SECRET

EXAMPLE = dict(
    line.split("=", 1)
    for line in (Path(__file__).parents[2] / "mlflow" / "server.env.example").read_text().splitlines()
    if line and not line.startswith("#")
)
WORD = "hush, hush, hush"  # of no user
SEARCH = "experiments/search?max_results=10"


def serve(root, environment):
    """Run mlflow/serve, which is expected to fail at once; `timeout` ends its children, too."""
    command = ["timeout", "30", root / "mlflow" / "serve"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("value", [None, "", EXAMPLE["MLFLOW_AUTH_ADMIN_PASSWORD"], "password1234", "tiny"])
@pytest.mark.parametrize("name", ["MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"])
def test_a_missing_or_known_password_is_refused(root, tmp_path, name, value):
    """Absent, empty, the example's, MLflow's old default or too short: one line, which names the variable."""
    environment = {key: found for key, found in Mlflow(tmp_path).environment.items() if key != name}
    if value is not None:
        environment[name] = value
    result = serve(root, environment)

    assert result.returncode == 1
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert name in result.stderr
    assert not value or value not in result.stderr.replace(name, "")


@pytest.mark.parametrize("name", [name for name, value in EXAMPLE.items() if value.startswith("change-me")])
def test_no_value_of_the_example_is_taken(root, tmp_path, name):
    """The example says that what begins with change-me is refused."""
    result = serve(root, {**Mlflow(tmp_path).environment, name: EXAMPLE[name]})

    assert result.returncode == 1
    assert result.stderr == f"mlflow/serve: {name} is a well-known value; make another: openssl rand -hex 32\n"


@pytest.mark.parametrize("name", ["MLFLOW_BACKEND_STORE_URI", "ESPALIER_AUTH_DATABASE_URI"])
@pytest.mark.parametrize(
    "uri", [f"postgresql://me:{WORD}/@127.0.0.1/x", f"postgresql://127.0.0.1/x?user=me&password={WORD}"]
)
def test_a_password_in_an_address_is_refused(root, tmp_path, name, uri):
    """It would appear in the process list and the log."""
    environment = {**Mlflow(tmp_path).environment, name: uri}
    result = serve(root, environment)

    assert result.returncode == 1
    assert result.stderr == f"mlflow/serve: {name} holds a password; give it as PGPASSWORD instead\n"


@pytest.mark.e2e
def test_it_listens_on_loopback_only(bare_mlflow_server):
    """By default no other machine can reach it."""
    listening = {
        socket.laddr
        for process in bare_mlflow_server.processes()
        for socket in process.net_connections()
        if socket.status == psutil.CONN_LISTEN
    }

    assert listening == {("127.0.0.1", bare_mlflow_server.port)}


def test_a_request_needs_a_user_and_password(bare_mlflow_server):
    """No user, a wrong password and an unknown user are refused in the same way."""
    server = bare_mlflow_server

    assert server.request_status(SEARCH, server.admin) == 200
    assert server.request_status(SEARCH) == 401
    assert server.request_status(SEARCH, (server.username, "not the password")) == 401
    assert server.request_status(SEARCH, ("nobody", server.password)) == 401


def test_other_host_names_are_refused(bare_mlflow_server):
    """A web page cannot reach it through a host name that resolves to loopback (DNS rebinding)."""
    server = bare_mlflow_server

    assert server.request_status(SEARCH, server.admin, f"localhost:{server.port}") == 200
    assert server.request_status(SEARCH, server.admin, f"evil.example:{server.port}") == 403


def test_users_read_and_do_not_change_what_others_created(bare_mlflow_server, as_client):
    """Only the owner writes to an experiment, and only the admin creates users."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    server = as_client(bare_mlflow_server)
    experiment = MlflowClient(server.uri).create_experiment("of the admin")
    reader = server.new_user()
    as_client(server, reader)

    assert MlflowClient(server.uri).get_experiment(experiment).name == "of the admin"
    with pytest.raises(MlflowException, match="Permission denied"):
        MlflowClient(server.uri).create_run(experiment)
    assert server.request_status("users/create", reader, body={"username": "another", "password": WORD}) == 403


def test_it_says_its_time(bare_mlflow_server, as_client):
    """Leases are measured by its clock; to ask changes no model."""
    as_client(bare_mlflow_server)
    registry = Registry()
    registry.create_model("asked")
    registry.client.update_registered_model("asked", "what it is")
    begin = time.time()
    now = registry.now_ms("asked") / 1000

    assert begin - 1 < now < time.time() + 1
    assert registry.client.get_registered_model("asked").description == "what it is"


@pytest.mark.e2e
def test_the_worker_of_the_stack_is_no_admin(root, bare_mlflow_server, as_client, tmp_path, monkeypatch):
    """The job of compose.yaml creates its user, who records, registers and promotes, and only reads what others own."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    server = as_client(bare_mlflow_server)
    others = MlflowClient(server.uri).create_registered_model("of the admin").name
    services = YAML(typ="safe").load(root / "compose.yaml")["services"]
    python, *code = services["users"]["command"]
    for password in ("the first password", "the second password"):
        monkeypatch.setenv("WORKER_PASSWORD", password)
        subprocess.run([sys.executable, *code], check=True, cwd=tmp_path)
    worker = services["worker"]["environment"]["MLFLOW_TRACKING_USERNAME"].partition(":-")[2].rstrip("}")
    as_client(server, (worker, "the second password"))
    client = MlflowClient(server.uri)
    run = client.create_run(client.create_experiment("of the worker"))
    client.create_registered_model("mine")
    version = client.create_model_version("mine", f"{run.info.artifact_uri}/x", run.info.run_id)
    client.set_registered_model_alias("mine", "champion", version.version)

    assert python == "python"
    assert server.request_status(SEARCH, (worker, "the first password")) == 401
    assert (
        server.request_status("users/create", (worker, "the second password"), body={"username": "x", "password": WORD})
        == 403
    )
    with pytest.raises(MlflowException, match="Permission denied"):
        client.update_registered_model(others, "changed")
    assert services["worker"]["depends_on"]["users"] == {"condition": "service_completed_successfully"}
    assert "admin" not in json.dumps([services[it]["environment"] for it in ("worker", "worker-gpu")])


@pytest.mark.e2e
def test_a_run_survives_restarts_of_its_servers(mlflow_server, postgres, swift, as_client, tmp_path):
    """PostgreSQL restarts during a run, then MLflow is killed; all metrics are in PostgreSQL, the artifact in S3."""
    from mlflow import MlflowClient

    server = as_client(mlflow_server)
    client = MlflowClient(server.uri)
    run_id = client.create_run(client.create_experiment("restarts")).info.run_id
    (tmp_path / "notes.txt").write_text("kept")
    client.log_metric(run_id, "loss", 2.0, step=0)
    client.log_artifact(run_id, str(tmp_path / "notes.txt"))
    postgres.restart()
    client.log_metric(run_id, "loss", 1.0, step=1)
    server.kill()
    server.start()
    client.log_metric(run_id, "loss", 0.5, step=2)
    (tmp_path / "down").mkdir()

    assert [found.value for found in client.get_metric_history(run_id, "loss")] == [2.0, 1.0, 0.5]
    assert Path(client.download_artifacts(run_id, "notes.txt", str(tmp_path / "down"))).read_text() == "kept"
    database = server.environment["MLFLOW_BACKEND_STORE_URI"].rpartition("/")[2]
    assert postgres.query(f"SELECT count(*) FROM metrics WHERE run_uuid = '{run_id}'", database) == [(3,)]
    bucket = server.environment["MLFLOW_ARTIFACTS_DESTINATION"].split("/")[2]
    keys = [item["Key"] for item in s3_client(swift).list_objects_v2(Bucket=bucket)["Contents"]]
    assert [key.rpartition("/")[2] for key in keys if run_id in key] == ["notes.txt"]


@pytest.mark.parametrize("name", ["bare_mlflow_server", pytest.param("mlflow_server", marks=pytest.mark.e2e)])
def test_secrets_are_in_no_command_line_and_no_log(request, name):
    """From the first process on; files that hold them are readable by their owner only."""
    server = request.getfixturevalue(name)
    server.note_command_lines()
    secrets = {server.password, server.key}
    if name == "mlflow_server":
        secrets |= {request.getfixturevalue("postgres").password, SECRET}
    lines = "\n".join(server.command_lines)

    assert "db upgrade" in lines  # the command lines start with the first process
    assert "uvicorn" in lines
    assert [secret for secret in secrets if secret in lines] == []
    assert [secret for secret in secrets if secret in server.log.read_text()] == []
    files = list(server.log.parent.glob("tmp*"))
    assert files  # mlflow/serve writes one
    for path in files:
        assert [secret for secret in secrets if secret.encode() in path.read_bytes()] == []
        assert path.stat().st_mode & 0o077 == 0


def test_postgres_recovers_after_a_kill(postgres):
    """The tests' own server keeps what was committed, and requires its password."""
    import psycopg2

    postgres.query("CREATE TABLE survivor AS SELECT 7 AS number")
    postgres.kill()
    postgres.start()

    assert postgres.query("SELECT number FROM survivor") == [(7,)]
    with pytest.raises(psycopg2.OperationalError, match="password"):
        psycopg2.connect(host="127.0.0.1", port=postgres.port, user=postgres.user, password=WORD, dbname="postgres")
