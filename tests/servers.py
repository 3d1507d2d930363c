"""PostgreSQL and MLflow servers on loopback, which tests may stop, kill and start again."""

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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import psutil
import pytest

from tests.swift import BIN, KEY, SECRET, Swift, free_ports

ROOT = Path(__file__).parents[1]
POSTGRES_BINS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
FOREIGN = ("AWS_", "ESPALIER_", "MLFLOW_", "PG")


def own_environment(**changes):
    """Copy this process's environment without the settings of other servers, and with changes."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN)}
    return {**kept, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **changes}


def await_ping(address, process, seconds=120):
    """Wait until a model that a process serves answers; a process that has ended is not waited for."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            urlopen(f"{address}/ping", timeout=2).close()
            return
        time.sleep(0.2)


class Postgres:
    """A PostgreSQL server with its own disk and port, and password authentication (SCRAM).

    Args:
        root: A new folder that the user postgres can reach, which is not true of the tmp_path of root.
    """

    user = "espalier"

    def __init__(self, root):
        self.disk, self.log, self.password = root / "disk", root / "log", secrets.token_hex(16)
        (self.port,) = free_ports(1)
        self.databases = 0
        root.mkdir()
        # PostgreSQL refuses to run as root; Debian's package creates the user postgres.
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
            config.write(
                "fsync = off\nshared_buffers = 16MB\n"
            )  # fsync protects from power cuts, not from a killed process

    def _run(self, tool, *options):
        command = [POSTGRES_BINS[-1] / tool, "--pgdata", self.disk, *options]
        subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL, **self.owner)

    @property
    def environment(self):
        """Environment variables that a client needs besides the address."""
        return {"PGPASSWORD": self.password}

    def new_database(self):
        """Create an empty database and return its address, without the password."""
        self.databases += 1
        self.query(f"CREATE DATABASE test{self.databases}")
        return f"postgresql://{self.user}@127.0.0.1:{self.port}/test{self.databases}"

    def query(self, sql, database="postgres"):
        """Run a statement and return its rows, or None if it has no result."""
        import psycopg2

        address = {"host": "127.0.0.1", "port": self.port, "user": self.user, "password": self.password}
        with contextlib.closing(psycopg2.connect(dbname=database, **address)) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute(sql)
                return cursor.fetchall() if cursor.description else None

    def start(self):
        """Start the server and wait until it answers."""
        self._run("pg_ctl", "start", "--wait", "--silent", "--timeout=60", f"--log={self.log}")

    def stop(self):
        """Stop the server in order and disconnect its clients."""
        self._run("pg_ctl", "stop", "--wait", "--silent", "--mode=fast")

    def restart(self):
        """Stop the server in order and start it again."""
        self.stop()
        self.start()

    def kill(self):
        """Stop the server at once; the next start recovers its data."""
        if (self.disk / "postmaster.pid").exists():
            self._run("pg_ctl", "stop", "--wait", "--silent", "--mode=immediate")


class Mlflow:
    """An MLflow server, started through mlflow/serve in its own process session.

    Args:
        root: Folder of the log, and by default of database and artifacts.
        backend: Address of the database of runs, models and users; None for a file in root.
        artifacts: A folder or s3://bucket/prefix; None for a folder in root.
        environment: Variables for database and S3; they override those of mlflow/serve.
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
        """The server's address."""
        return f"http://127.0.0.1:{self.port}"

    def client_environment(self, user=None):
        """Environment variables for a client, as a user (name, password) or as the admin."""
        name, password = user or self.admin
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": name,
            "MLFLOW_TRACKING_PASSWORD": password,
        }

    def processes(self):
        """List all processes of the server's session."""
        members = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError):
                if self.process and os.getsid(process.pid) == self.process.pid:
                    members.append(process)
        return members

    def start(self, seconds=120):
        """Start the server, wait until it answers, and note the command lines of its processes."""
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
        """Add the current command lines, which `ps` shows to every user."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                self.command_lines.add(" ".join(process.cmdline()))

    def answers(self):
        """Whether the server answers."""
        with contextlib.suppress(URLError, OSError), urlopen(f"{self.uri}/health", timeout=2) as answer:
            return answer.status == 200
        return False

    def request_status(self, path, user=None, host=None, body=None):
        """Send one request, as a user (name, password) or anonymously, and return the HTTP status."""
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
        """Name and password of the admin."""
        return self.username, self.password

    def new_user(self):
        """Create a user as the admin and return name and password."""
        name, password = f"user-{secrets.token_hex(4)}", secrets.token_hex(16)
        assert self.request_status("users/create", self.admin, body={"username": name, "password": password}) == 200
        return name, password

    def stop(self):
        """Stop the server with SIGTERM."""
        self._end(signal.SIGTERM)

    def kill(self):
        """Stop the server with SIGKILL."""
        self._end(signal.SIGKILL)

    def _end(self, signal_number):
        if self.process is None:
            return
        for process in self.processes():
            with contextlib.suppress(OSError):
                os.kill(process.pid, signal_number)
        self.process.wait(60)
        deadline = time.monotonic() + 60
        while self.processes():
            assert time.monotonic() < deadline, "a process of MLflow is still running"
            time.sleep(0.05)
        self.process = None


@contextlib.contextmanager
def running(server):
    """Start a server, and kill it at the end."""
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def running_postgres():
    """Run a PostgreSQL server on an empty disk; needs its programs."""
    folder = Path(tempfile.mkdtemp(prefix="espalier-postgres-"))
    folder.chmod(0o711)
    try:
        with running(Postgres(folder / "root")) as server:
            yield server
    finally:
        shutil.rmtree(folder)


def s3_environment(swift):
    """Environment variables for a client of the S3 server."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{swift.port}",
    }


def s3_client(swift):
    """Make a client of the S3 server that does not depend on the environment."""
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{swift.port}",
        region_name="us-east-1",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
    )


def full_mlflow(root, postgres, swift):
    """Prepare an MLflow server with its own database and bucket; it is not started."""
    bucket = f"mlflow-{uuid.uuid4().hex}"
    s3_client(swift).create_bucket(Bucket=bucket)
    secrets_ = {**postgres.environment, **s3_environment(swift)}
    return Mlflow(root, postgres.new_database(), f"s3://{bucket}/artifacts", **secrets_)


@contextlib.contextmanager
def running_stack(root):
    """Run PostgreSQL, Swift and MLflow over both, without fixtures: (postgres, swift, mlflow)."""
    (root / "swift").mkdir(parents=True)
    with contextlib.ExitStack() as servers:
        postgres = servers.enter_context(running_postgres())
        swift = servers.enter_context(running(Swift(root / "swift")))
        mlflow = servers.enter_context(running(full_mlflow(root / "mlflow", postgres, swift)))
        yield postgres, swift, mlflow


@pytest.fixture(scope="session")
def postgres():
    """The running PostgreSQL; a test that stops it starts it again."""
    if not POSTGRES_BINS or not sys.platform.startswith("linux"):
        if os.environ.get("CI"):
            pytest.fail("CI needs PostgreSQL: apt-get install postgresql")
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def mlflow_server(postgres, swift, tmp_path_factory):
    """The running MLflow over PostgreSQL and Swift; a test that stops it starts it again."""
    with running(full_mlflow(tmp_path_factory.mktemp("mlflow"), postgres, swift)) as server:
        yield server


@pytest.fixture(scope="session")
def bare_mlflow_server(tmp_path_factory):
    """The running MLflow over a file and a folder, with users and passwords."""
    with running(Mlflow(tmp_path_factory.mktemp("bare"))) as server:
        yield server


@pytest.fixture
def as_client(monkeypatch):
    """Make this process and its children clients of a server, as the admin or another user."""

    def connect(server, user=None):
        for key in [key for key in os.environ if key.startswith(FOREIGN)]:
            monkeypatch.delenv(key)
        for key, value in server.client_environment(user).items():
            monkeypatch.setenv(key, value)
        return server

    return connect


@pytest.fixture
def page_server():
    """Start a server that answers every request with one status and text, as another program does; its address."""
    with contextlib.ExitStack() as stack:

        def start(status, text):
            class Handler(BaseHTTPRequestHandler):
                def do_GET(self):
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(text.encode())

                def do_POST(self):
                    self.do_GET()

                def log_message(self, *_):
                    """Stay silent."""

            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield start
