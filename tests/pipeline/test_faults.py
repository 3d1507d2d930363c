"""Servers that die while a finished compression is recorded and registered: nothing is lost, doubled or half there."""

import subprocess
from dataclasses import dataclass

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from tests.orchestra import until
from tests.servers import full_mlflow, running

pytestmark = pytest.mark.e2e


@dataclass
class Site:
    """A workspace that is a client of a server of its own."""

    workspace: object
    server: object

    def run(self, *command):
        """Run a command in it."""
        return subprocess.run(
            command, cwd=self.workspace.path, env=self.environment, capture_output=True, text=True, check=False
        )

    @property
    def environment(self):
        """The workspace's own, with the server's address and password."""
        impatient = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
        return {**self.workspace.environment(), **self.server.client_environment(), **impatient}

    def look(self, name, monkeypatch):
        """Read what the server holds: how every run ended, the numbers of the versions."""
        client = self.client(monkeypatch, self.server.admin)
        experiment = client.get_experiment_by_name("espalier")
        runs = client.search_runs([experiment.experiment_id]) if experiment else []
        versions = client.search_model_versions(f"name = '{name}'")
        return [run.info.status for run in runs], [int(version.version) for version in versions]

    def client(self, monkeypatch, user):
        """Talk to the server as a user."""
        for key, value in self.server.client_environment(user).items():
            monkeypatch.setenv(key, value)
        return MlflowClient()


@pytest.fixture(scope="module")
def site(copy_finished, postgres, swift, tmp_path_factory):
    """A committed copy of the finished workspace, with PostgreSQL, MLflow and Swift."""
    folder = tmp_path_factory.mktemp("faults") / "mlflow"
    with running(full_mlflow(folder, postgres, swift)) as server:
        yield Site(copy_finished("faults", committed=True), server)


def register(name):
    """The command that registers under a name."""
    return "python", "-m", "stages.register", "--name", name


def test_postgresql_restarted_in_mid_run(site, postgres, monkeypatch):
    """The work goes on and the record is kept; once the database is there again it goes with the next call."""
    postgres.stop()
    failed = site.run("python", "-m", "stages.tracking", "--allow-offline")
    assert failed.returncode == 0
    assert "Warning: MLflow did not store the record" in failed.stderr
    postgres.start()

    assert site.run("python", "-m", "stages.tracking").returncode == 0
    assert site.look("none", monkeypatch) == (["FINISHED"], [])
    assert [path.name for path in (site.workspace.path / "unsent").iterdir()] == [".lock"]


def test_mlflow_killed_between_metrics_and_registration(site, monkeypatch):
    """The record is there, the version is not; registered again it is there once."""
    site.server.kill()
    failed = site.run(*register("killed"))
    assert failed.returncode == 75
    assert failed.stderr.startswith("Error: the MLflow registry failed to list killed: ")
    assert len(failed.stderr.splitlines()) == 1
    site.server.start()
    assert site.look("killed", monkeypatch) == (["FINISHED"], [])

    assert site.run(*register("killed")).returncode == 0
    assert site.look("killed", monkeypatch) == (["FINISHED"], [1])


def test_mlflow_killed_while_the_files_of_a_version_are_uploaded(site, monkeypatch):
    """No version names half of its files."""
    seen = site.server.log.read_text().count("/versions/")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(register("torn"), cwd=site.workspace.path, env=site.environment, **quiet)
    until(lambda: site.server.log.read_text().count("/versions/") > seen, 120, every=0.02)
    site.server.kill()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75
    assert said.startswith(b"Error: the MLflow registry failed to store the files"), said
    assert len(said.splitlines()) == 1, said
    site.server.start()
    assert site.look("torn", monkeypatch) == (["FINISHED"], [])

    result = site.run(*register("torn"))
    assert result.returncode == 0, result.stderr
    assert site.look("torn", monkeypatch) == (["FINISHED"], [1])


def test_a_reader_cannot_promote(site, monkeypatch):
    """Everybody may look and draw; only who was given the right may move an alias or change a tag."""
    assert site.run(*register("guarded")).returncode == 0
    client = site.client(monkeypatch, site.server.new_user())
    drawn = mlflow.pyfunc.load_model("models:/guarded@challenger").predict({"seed": [1]})

    assert drawn[0]["seed"] == 1
    with pytest.raises(MlflowException, match=r"(?i)permission|403"):
        client.set_registered_model_alias("guarded", "champion", "1")
    with pytest.raises(MlflowException, match=r"(?i)permission|403"):
        client.set_model_version_tag("guarded", "1", "espalier.content", "0" * 64)
