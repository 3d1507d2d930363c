"""The whole way on real servers: compress, push, register, promote, serve, draw, make again, roll back."""

import base64
import io
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from urllib.request import Request, urlopen

import pytest
from PIL import Image
from ruamel.yaml import YAML

from tests.repository import commit, git
from tests.servers import POSTGRES_BINS, await_ping, own_environment, running_stack, s3_client, s3_environment
from tests.swift import SECRET, free_ports

NAME = "espalier-digits"
SIZES = {
    "reference": {"num_images": 200, "sets": 5, "kid_subset_size": 100, "sampler": {"steps": 20}},
    "finetune": {"steps": 300},
    "costs": {"batches": [1], "repeats": 100, "seconds": 4.0},
}
"""Smaller than the defaults, so that it takes minutes."""
IMAGES = ".png", ".svg"


class Session:
    """A user with a clone of the project, who writes down all that is said.

    Args:
        home: An empty folder.
        make_workspace: Copies the project.
        environment: What leads to the servers.
    """

    def __init__(self, home, workspace, environment):
        self.home, self.workspace, self.said = home, workspace, []
        for section, values in SIZES.items():
            workspace.set(section, **values)
        self.environment = {
            **own_environment(**environment),
            "PREFECT_HOME": str(home / "prefect"),
        }
        git(self.workspace.path, "init", "-q")

    def run(self, *command, fails=False):
        """Run a command in the workspace: what it said."""
        begin = time.monotonic()
        result = subprocess.run(
            command, cwd=self.workspace.path, env=self.environment, capture_output=True, text=True, check=False
        )
        self.said.append(result.stdout + result.stderr)
        print(f"{time.monotonic() - begin:6.1f} s  {' '.join(command)}")
        assert (result.returncode != 0) == fails, self.said[-1]
        return result.stdout

    def commit(self, message):
        """Commit everything that git tracks."""
        commit(self.workspace.path, message)

    def serve(self, seeds):
        """Serve the champion as MLflow does, ask for images, stop: seed -> picture."""
        (port,) = free_ports(1)
        command = ["mlflow", "models", "serve", "-m", f"models:/{NAME}@champion", "--env-manager", "local"]
        log = self.home / "serve.log"
        with log.open("a") as lines:
            process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port)],
                cwd=self.workspace.path,
                env=self.environment,
                stdout=lines,
                stderr=lines,
                start_new_session=True,
            )
        try:
            answer = self._ask(f"http://127.0.0.1:{port}", seeds, process)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self.said.append(log.read_text())
        return {row["seed"]: base64.b64decode(row["png"]) for row in answer["predictions"]}

    def _ask(self, address, seeds, process):
        await_ping(address, process)
        body = json.dumps({"dataframe_records": [{"seed": seed} for seed in seeds]}).encode()
        with urlopen(Request(f"{address}/invocations", body, {"Content-Type": "application/json"}), timeout=60) as it:
            return json.load(it)

    def go(self, remote):
        """Go the whole way, with a bucket or a folder as DVC's remote."""
        self.run("dvc", "remote", "add", "-d", "store", remote)
        self.commit("Begin")
        self.run("python", "-m", "flows", "compress")
        self.run("dvc", "push", "--run-cache")
        self.commit("Compress")
        assert f"models:/{NAME}/1 registered" in self.run("python", "-m", "stages.register")
        assert f"models:/{NAME}/1 is the champion" in self.run("python", "-m", "flows", "promote", NAME)
        first = self.serve([1, 2])

        self.workspace.set("finetune", steps=400)
        self.run("python", "-m", "flows", "compress")
        self.run("dvc", "push", "--run-cache")
        self.commit("Train longer")
        self.run("python", "-m", "stages.register")
        self.run("python", "-m", "flows", "promote", NAME, "--policy", self.write_policy(), "--why", "trained longer")
        second = self.serve([1, 2])
        assert first.keys() == second.keys() == {1, 2}
        assert all(first[seed] != second[seed] for seed in first)

        assert f"models:/{NAME}/1 is identical" in self.run("python", "-m", "flows", "reproduce", f"models:/{NAME}/1")
        self.run("python", "-m", "flows", "rollback", NAME, "--why", "only to see")
        assert self.serve([2]) == {2: first[2]}
        lines = self.run("python", "-m", "flows", "ledger", NAME).splitlines()
        acts = [re.search(r"(\w+ \S+ -> \d+: \w+), by (\S+)", line)[1] for line in lines]
        assert acts == ["rollback 2 -> 1: done", "promote 1 -> 2: done", "promote none -> 1: done"]
        assert Image.open(io.BytesIO(first[1])).size == (16, 16)
        return first

    def write_policy(self):
        """The project's own policy, with more room between two champions: a thousand images tell them apart badly."""
        policy = YAML(typ="safe").load((self.workspace.path / "mlflow" / "promotion.yaml").read_text())
        policy["champion"] |= {"fid": 0.5, "ssim": 0.05}
        path = self.home / "policy.yaml"
        YAML().dump(policy, path)
        return str(path)


@pytest.fixture
def session(make_workspace, root):
    """Begin one in an empty folder, with what leads to the servers."""

    def begin(home, environment):
        workspace = make_workspace("session")
        shutil.copytree(root / "mlflow", workspace.path / "mlflow")
        shutil.copyfile(root / "params.yaml", workspace.path / "params.yaml")
        shutil.copyfile(root / "requirements.lock", workspace.path / "requirements.lock")
        return Session(home, workspace, environment)

    return begin


def files_below(folder):
    """Every file: path -> content."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def find_pickles(contents, is_pickle):
    """Name those that are pickles; the pictures' own checksums can look like one."""
    return [name for name, body in contents.items() if not str(name).endswith(IMAGES) and is_pickle(body)]


@pytest.mark.e2e
@pytest.mark.timeout(3600)
def test_on_real_servers(tmp_path, session, is_pickle):
    """PostgreSQL, MLflow with users, S3: nothing is pickled, and no secret is in anything that was said or kept."""
    if not POSTGRES_BINS or not sys.platform.startswith("linux"):
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with ExitStack() as stack:
        postgres, swift, mlflow = stack.enter_context(running_stack(tmp_path / "servers"))
        client, s3 = s3_client(swift), s3_environment(swift)
        bucket = f"espalier-{secrets.token_hex(4)}"
        client.create_bucket(Bucket=bucket)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            s3[name] = str(tmp_path / "empty")  # dvc-s3 fails at the /dev/null that suits boto3
        (tmp_path / "empty").touch()
        environment = {**mlflow.client_environment(), **s3, "ESPALIER_STORE": f"s3://{bucket}/store"}
        user = session(tmp_path, environment)
        user.go(f"s3://{bucket}/dvc")

        objects = {}
        for place in [it["Name"] for it in client.list_buckets()["Buckets"]]:
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=place):
                for item in page.get("Contents", []):
                    objects[f"{place}/{item['Key']}"] = client.get_object(Bucket=place, Key=item["Key"])["Body"].read()
        tables = postgres.query("SELECT tablename FROM pg_tables WHERE schemaname = 'public'", "test1")
        rows = [str(postgres.query(f'SELECT * FROM "{table}"', "test1")) for (table,) in tables]
        said = [*user.said, *rows, mlflow.log.read_text(), *(mlflow.command_lines)]
    kept = {**objects, **files_below(user.workspace.path)}

    print(f"{len(objects)} objects in S3, {len(kept) - len(objects)} files, {len(said)} logs and tables were looked at")
    assert len(objects) > 50
    assert any("/store/manifests/models/" in name for name in objects)
    assert find_pickles(kept, is_pickle) == []
    hidden = {"S3": SECRET, "MLflow": mlflow.password, "its key": mlflow.key, "PostgreSQL": postgres.password}
    everything = [*kept.values(), *(text.encode() for text in said)]
    assert [name for name, secret in hidden.items() if any(secret.encode() in one for one in everything)] == []


@pytest.mark.e2e
@pytest.mark.timeout(3600)
def test_without_any_server(tmp_path, session, is_pickle):
    """SQLite and folders: the same commands, the same outcome."""
    remote = tmp_path / "remote"
    user = session(tmp_path, {})
    user.go(str(remote))
    kept = {**files_below(user.workspace.path), **files_below(remote)}

    assert len(files_below(remote)) > 30
    assert find_pickles(kept, is_pickle) == []
    assert [path.name for path in (user.workspace.path / "unsent").iterdir()] == [".lock"]
