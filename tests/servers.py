"""Real servers on loopback, PostgreSQL and MLflow, which tests may stop, kill and start again."""

import contextlib
import json
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from base64 import b64encode
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import boto3
import psutil
import pytest

from tests.swift import BIN, KEY, SECRET, Swift, free_ports

ROOT = Path(__file__).parents[1]
POSTGRES_BINS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
FOREIGN = ("AWS_", "ESPALIER_", "MLFLOW_", "PG")


def own_environment(**changes):
    """Give this process's environment without what it says of other servers, and with changes."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
    return {**kept, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **changes}


class Postgres:
    """A PostgreSQL with a disk and port of its own, which asks for a password (scram).

    Args:
        root: A folder that does not exist yet and that any user can reach; root's own tmp_path is none such.
    """

    user = "espalier"

    def __init__(self, root):
        self.disk, self.log, self.password = root / "disk", root / "log", secrets.token_hex(16)
        (self.port,) = free_ports(1)
        self.databases = 0
        root.mkdir()
        # It refuses to run as root; Debian's package comes with a user for it.
        self.owner = {}
        if os.getuid() == 0:
            owner = pwd.getpwnam("postgres")
            self.owner = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
            os.chown(root, owner.pw_uid, owner.pw_gid)
        password = root / "password"
        password.write_text(self.password)
        password.chmod(0o644)
        self._run("initdb", f"--username={self.user}", "--auth=scram-sha-256", f"--pwfile={password}", "--no-sync")
        password.unlink()
        with (self.disk / "postgresql.conf").open("a") as config:
            config.write(f"listen_addresses = '127.0.0.1'\nport = {self.port}\nunix_socket_directories = ''\n")
            config.write("fsync = off\nshared_buffers = 16MB\n")  # a killed process loses nothing by it

    def _run(self, tool, *options):
        command = [POSTGRES_BINS[-1] / tool, "--pgdata", self.disk, *options]
        subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL, **self.owner)

    @property
    def environment(self):
        """What a client needs besides the address."""
        return {"PGPASSWORD": self.password}

    def new_database(self):
        """Make an empty database: its address, which holds no password."""
        self.databases += 1
        self.query(f"CREATE DATABASE test{self.databases}")
        return f"postgresql://{self.user}@127.0.0.1:{self.port}/test{self.databases}"

    def query(self, sql, database="postgres"):
        """Ask something: rows, or nothing."""
        import psycopg2

        address = {"host": "127.0.0.1", "port": self.port, "user": self.user, "password": self.password}
        with contextlib.closing(psycopg2.connect(dbname=database, **address)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql)
                return cursor.fetchall() if cursor.description else None

    def start(self):
        """Start it, and wait until it answers."""
        self._run("pg_ctl", "start", "--wait", "--silent", "--timeout=60", f"--log={self.log}")

    def stop(self):
        """End it in order, cutting its clients off."""
        self._run("pg_ctl", "stop", "--wait", "--silent", "--mode=fast")

    def restart(self):
        """End it in order and start it again."""
        self.stop()
        self.start()

    def kill(self):
        """End it at once, as a power cut does; the next start recovers."""
        if (self.disk / "postmaster.pid").exists():
            self._run("pg_ctl", "stop", "--wait", "--silent", "--mode=immediate")


class Mlflow:
    """A tracking and registry server, started through mlflow/serve in a session of its own.

    Args:
        root: A folder for its log and, unless told otherwise, for everything it keeps.
        backend: The database of runs, models and users.
        artifacts: A folder or s3://bucket/prefix.
        environment: What database and S3 need; also overrides any variable of mlflow/serve.
    """

    username = "admin"

    def __init__(self, root, backend=None, artifacts=None, **environment):
        root.mkdir(parents=True, exist_ok=True)
        (self.port,) = free_ports(1)
        self.log, self.process, self.command_lines = root / "mlflow.log", None, set()
        self.password, self.key = secrets.token_hex(16), secrets.token_hex(16)
        self.environment = own_environment(
            MLFLOW_BACKEND_STORE_URI=backend or f"sqlite:///{root}/mlflow.db",
            MLFLOW_ARTIFACTS_DESTINATION=str(artifacts or root / "artifacts"),
            MLFLOW_AUTH_ADMIN_USERNAME=self.username,
            MLFLOW_AUTH_ADMIN_PASSWORD=self.password,
            MLFLOW_FLASK_SERVER_SECRET_KEY=self.key,
            MLFLOW_PORT=str(self.port),
            MLFLOW_WORKERS="1",
            TMPDIR=str(root),
            **environment,
        )

    @property
    def uri(self):
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def client_environment(self, user=None):
        """What a client of it needs, as user (name, password) or as the admin."""
        name, password = user or self.admin
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": name,
            "MLFLOW_TRACKING_PASSWORD": password,
        }

    def processes(self):
        """List all processes of its session."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                if self.process and os.getsid(process.pid) == self.process.pid:
                    found.append(process)
        return found

    def start(self, seconds=120):
        """Start it, and wait until it answers, noting every command line on the way."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [ROOT / "mlflow" / "serve"],
                cwd=self.log.parent,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + seconds
        while not self.answers():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            self.note_command_lines()
            time.sleep(0.1)
        self.note_command_lines()

    def note_command_lines(self):
        """Add those that `ps` would show now."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                self.command_lines.add(" ".join(process.cmdline()))

    def answers(self):
        """Whether it is there."""
        with contextlib.suppress(URLError, OSError), urlopen(f"{self.uri}/health", timeout=2) as answer:
            return answer.status == 200
        return False

    def ask(self, path, user=None, host=None, body=None):
        """Send one request, as user (name, password) or as nobody: the status of the answer."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.uri}/api/2.0/mlflow/{path}", data, {"Content-Type": "application/json"})
        if user:
            request.add_header("Authorization", f"Basic {b64encode(':'.join(user).encode()).decode()}")
        if host:
            request.add_header("Host", host)
        try:
            with urlopen(request, timeout=60) as answer:
                return answer.status
        except HTTPError as error:
            error.close()
            return error.code

    @property
    def admin(self):
        """Name and password of the first user."""
        return self.username, self.password

    def new_user(self):
        """Let the admin make a user: name and password."""
        name, password = f"user-{secrets.token_hex(4)}", secrets.token_hex(16)
        assert self.ask("users/create", self.admin, body={"username": name, "password": password}) == 200
        return name, password

    def stop(self):
        """End it in order."""
        self._end(signal.SIGTERM)

    def kill(self):
        """End it at once."""
        self._end(signal.SIGKILL)

    def _end(self, how):
        if self.process is None:
            return
        for process in self.processes():
            with contextlib.suppress(OSError):
                os.kill(process.pid, how)
        self.process.wait(60)
        deadline = time.monotonic() + 60
        while self.processes():
            assert time.monotonic() < deadline, "a process of MLflow stays"
            time.sleep(0.05)
        self.process = None


@contextlib.contextmanager
def running(server):
    """Start a server, and end it at once in the end."""
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def running_postgres():
    """A PostgreSQL from an empty disk; needs its programs."""
    home = Path(tempfile.mkdtemp(prefix="espalier-postgres-"))
    home.chmod(0o711)
    try:
        with running(Postgres(home / "root")) as server:
            yield server
    finally:
        shutil.rmtree(home)


def s3_environment(swift):
    """What a client of the S3 server needs."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{swift.port}",
    }


def s3_client(swift):
    """Talk to the S3 server, whatever the environment says."""
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{swift.port}",
        region_name="us-east-1",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
    )


def full_mlflow(root, postgres, swift):
    """Prepare an MLflow over a database and bucket of its own, not started yet."""
    bucket = f"mlflow-{uuid.uuid4().hex}"
    s3_client(swift).create_bucket(Bucket=bucket)
    secrets_ = {**postgres.environment, **s3_environment(swift)}
    return Mlflow(root, postgres.new_database(), f"s3://{bucket}/artifacts", **secrets_)


@contextlib.contextmanager
def running_stack(root):
    """PostgreSQL, Swift and MLflow over both, for one who has no fixtures: (postgres, swift, mlflow)."""
    (root / "swift").mkdir(parents=True)
    with contextlib.ExitStack() as servers:
        postgres = servers.enter_context(running_postgres())
        swift = servers.enter_context(running(Swift(root / "swift")))
        mlflow = servers.enter_context(running(full_mlflow(root / "mlflow", postgres, swift)))
        yield postgres, swift, mlflow


@pytest.fixture(scope="session")
def postgres():
    """The running PostgreSQL; whoever stops it starts it again."""
    if not POSTGRES_BINS or not sys.platform.startswith("linux"):
        if os.environ.get("CI"):
            pytest.fail("CI needs PostgreSQL: apt-get install postgresql")
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def mlflow_server(postgres, swift, tmp_path_factory):
    """The running MLflow over PostgreSQL and Swift; whoever stops it starts it again."""
    with running(full_mlflow(tmp_path_factory.mktemp("mlflow"), postgres, swift)) as server:
        yield server


@pytest.fixture(scope="session")
def bare_mlflow_server(tmp_path_factory):
    """The running MLflow over a file and a folder, with users and passwords all the same."""
    with running(Mlflow(tmp_path_factory.mktemp("bare"))) as server:
        yield server


@pytest.fixture
def as_client(monkeypatch):
    """Make this process and its children clients of a server, as its admin or another user."""

    def connect(server, user=None):
        for key in [key for key in os.environ if key.startswith(FOREIGN)]:
            monkeypatch.delenv(key)
        for key, value in server.client_environment(user).items():
            monkeypatch.setenv(key, value)
        return server

    return connect
