"""A real Prefect server and real process workers on loopback, which tests may stop, kill and restart."""

import contextlib
import json
import secrets
import signal
import subprocess
import sys
import time
import uuid
from base64 import b64encode
from http import HTTPStatus
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import psutil
import pytest

from tests.servers import ROOT, own_environment, running
from tests.swift import BIN, free_ports

MARK = "ORCHESTRA_MARK"
"""Environment variable of every program of this module and of all processes that it starts."""
PREFECT = BIN / "prefect"
QUIET = {
    "DO_NOT_TRACK": "1",
    "NO_COLOR": "1",
    "PREFECT_CLI_COLORS": "false",
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_CLI_WRAP_LINES": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}
SERVER = {
    "PREFECT_SERVER_API_HOST": "127.0.0.1",
    "PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS": "2",
    "PREFECT_SERVER_SERVICES_FOREMAN_LOOP_SECONDS": "2",
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
    "PREFECT_SERVER_SERVICES_SCHEDULER_RECENT_DEPLOYMENTS_LOOP_SECONDS": "1",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_UI_V2_ENABLED": "false",  # it calls amplitude.com, whatever the settings are
}
"""The server schedules cron runs and checks waiting runs every two seconds, not every thirty."""
WORKER = {
    "PREFECT_WORKER_HEARTBEAT_SECONDS": "2",
    "PREFECT_WORKER_PREFETCH_SECONDS": "1",
    "PREFECT_WORKER_QUERY_SECONDS": "1",
}
"""A worker polls for runs every second, not every ten."""


def bare_environment(**changes):
    """Copy this process's environment without the settings of any server, with changes."""
    return {key: value for key, value in own_environment().items() if not key.startswith("PREFECT_")} | changes


def until(condition, seconds=60, every=0.1):
    """Wait until a condition holds; returns its value, which is false after a timeout."""
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(every)
    return found


def is_alive(process):
    """Whether a process runs; one that has ended may stay as a zombie of the process that takes orphans."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def descendants(mark):
    """List the living processes that carry a mark, whatever their parent."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def command_line(process):
    """Read the command line of a process; empty where it has ended, as the git of a program does at any time."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


class Program:
    """A command in a session of its own; it and all processes that it starts carry a mark."""

    def __init__(self, command, cwd, log, environment):
        self.command, self.cwd, self.log = command, cwd, log
        self.process, self.command_lines, self.mark = None, set(), uuid.uuid4().hex
        self.environment = {**environment, MARK: self.mark}

    def start(self, seconds=120):
        """Start it, and wait until it is ready."""
        begin = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [str(part) for part in self.command],
                cwd=self.cwd,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        ready = until(lambda: self.process.poll() is not None or self.is_ready(self.output(begin)), seconds)
        assert ready, f"{self.log} after {seconds} s: {self.output(begin)}"
        assert self.process.poll() is None, self.output(begin)
        self.note_command_lines()

    def is_ready(self, output):
        """Whether it is ready, by its output since the start or otherwise."""
        raise NotImplementedError

    def output(self, begin=0):
        """Read its log, from a byte on."""
        return self.log.read_bytes()[begin:].decode(errors="replace")

    def note_command_lines(self):
        """Collect the command lines that `ps` would show now."""
        self.command_lines |= {command_line(process) for process in descendants(self.mark)}

    def orphans(self):
        """List the living processes that it started, without itself."""
        own = self.process.pid if self.process else None
        return [process for process in descendants(self.mark) if process.pid != own]

    def stop(self, how=signal.SIGTERM, seconds=60):
        """Signal it alone and wait for its end; returns the exit code, None where it does not run."""
        if self.process is None:
            return None
        self.process.send_signal(how)
        exit_code = self.process.wait(seconds)
        self.process = None
        return exit_code

    def strike(self):
        """Kill it alone, as the kernel does when memory is short."""
        if self.process:
            self.process.kill()
            self.process.wait()
        self.process = None

    def kill(self):
        """Kill it and all processes that it started."""
        while found := descendants(self.mark):
            for process in found:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if self.process:
                self.process.wait()
            time.sleep(0.02)
        self.process = None


class PrefectServer(Program):
    """A server with its scheduler, user interface and one user, whose password every request needs.

    Args:
        root: A folder for its log and, by default, for everything it keeps.
        backend: The database, postgresql://user@host:port/name as Postgres.new_database() gives it.
        environment: Variables for the database; they also override any setting.
    """

    def __init__(self, root, backend=None, **environment):
        root.mkdir(parents=True, exist_ok=True)
        (self.port,) = free_ports(1)
        self.auth = f"admin:{secrets.token_hex(16)}"
        backend = backend or f"sqlite+aiosqlite:///{root}/prefect.db"
        settings = {
            **QUIET,
            **SERVER,
            "PREFECT_HOME": str(root / "home"),
            "PYTHONPATH": str(ROOT),
            "PREFECT_SERVER_API_AUTH_STRING": self.auth,
            "PREFECT_SERVER_API_PORT": str(self.port),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": backend.replace("postgresql://", "postgresql+asyncpg://"),
            "PREFECT_SERVER_UI_API_URL": self.uri,
            "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(root / "ui"),  # by default it writes into its own package
        }
        self.client_home = root / "client"
        command = [sys.executable, "-m", "flows", "server"]
        super().__init__(command, root, root / "prefect.log", bare_environment(**settings) | environment)

    @property
    def uri(self):
        """Address of its API."""
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def page(self):
        """Address of its user interface."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def password(self):
        """The password of its user, which every request needs."""
        return self.auth.partition(":")[2]

    def client_environment(self):
        """Environment variables of its clients."""
        return {
            **QUIET,
            "PREFECT_API_AUTH_STRING": self.auth,
            "PREFECT_API_URL": self.uri,
            "PREFECT_HOME": str(self.client_home),
        }

    def is_ready(self, output):  # noqa: ARG002
        """Whether its API answers."""
        return self.answers()

    def answers(self):
        """Whether server and database answer."""
        with contextlib.suppress(URLError, OSError), urlopen(f"{self.uri}/ready", timeout=5) as response:
            return response.status == 200
        return False

    def request(self, path, body=None, method=None):
        """Send a request as its user, again while SQLite is busy; returns the JSON. Without a body it is a GET."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.uri}/{path}", data, {"Content-Type": "application/json"}, method=method)
        request.add_header("Authorization", f"Basic {b64encode(self.auth.encode()).decode()}")
        deadline = time.monotonic() + 60
        while True:
            try:
                with urlopen(request, timeout=60) as response:
                    content = response.read()
                return json.loads(content) if content else None
            except HTTPError as error:
                if error.code != HTTPStatus.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                    raise AssertionError(f"{path}: {error.code} {error.read().decode()}") from None
                time.sleep(0.5)

    def cli(self, *arguments, cwd=None, **environment):
        """Run `prefect` as its client; returns the finished process with its output."""
        return subprocess.run(
            [PREFECT, *arguments],
            cwd=cwd or self.cwd,
            env=bare_environment(**self.client_environment()) | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def submit(self, deployment, **parameters):
        """Start a run of a deployment, flow/name; returns its id."""
        found = self.request(f"deployments/name/{deployment}")
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return self.request(f"deployments/{found['id']}/create_flow_run", body)["id"]

    def state(self, run):
        """Read the name of a run's state, such as Completed, or Late, which is of type SCHEDULED."""
        return self.request(f"flow_runs/{run}")["state"]["name"]

    def wait(self, run, seconds=120):
        """Wait until a run is over; returns the name of its final state."""
        final = {"CANCELLED", "COMPLETED", "CRASHED", "FAILED"}
        until(lambda: self.request(f"flow_runs/{run}")["state"]["type"] in final, seconds)
        return self.state(run)

    def states(self, run):
        """List all states of a run, oldest first, as dictionaries."""
        return sorted(self.request(f"flow_run_states/?flow_run_id={run}"), key=lambda state: state["timestamp"])

    def lines(self, run):
        """List what a run logged, oldest first."""
        begin, found = 0, []
        while True:
            logs = {"flow_run_id": {"any_": [run]}}
            page = self.request("logs/filter", {"logs": logs, "sort": "TIMESTAMP_ASC", "offset": begin, "limit": 200})
            if not page:
                return found
            found += [line["message"] for line in page]
            begin += len(page)

    def cancel(self, run):
        """Cancel a run, as the button of the user interface does."""
        body = {"state": {"type": "CANCELLING", "name": "Cancelling"}, "force": False}
        return self.request(f"flow_runs/{run}/set_state", body)["status"]


class Worker(Program):
    """A process worker of a pool, which it makes if it is missing.

    Args:
        root: A folder for its log and home.
        server: The PrefectServer that it polls.
        pool: Name of the pool.
        name: Its own name.
        cwd: Folder in which it starts; flows without a working folder of their own run in temporary folders.
        limit: Runs at once; None for any number.
        environment: Variables for the flows; they also override any setting.
    """

    def __init__(self, root, server, pool, name, cwd, limit=None, **environment):
        root.mkdir(parents=True, exist_ok=True)
        settings = {**server.client_environment(), **WORKER, "PREFECT_HOME": str(root / "home")}
        command = [PREFECT, "worker", "start", "--type", "process", "--pool", pool, "--name", name]
        command += ["--limit", str(limit)] if limit else []
        super().__init__(command, cwd, root / f"{name}.log", bare_environment(**settings) | environment)
        self.name = name

    def is_ready(self, output):
        """Whether it polls for runs."""
        return f"Worker '{self.name}' started!" in output


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory):
    """The running Prefect over SQLite; a test that stops it starts it again."""
    with running(PrefectServer(tmp_path_factory.mktemp("prefect"))) as server:
        yield server


@pytest.fixture(scope="session")
def full_prefect_server(postgres, tmp_path_factory):
    """The running Prefect over PostgreSQL; a test that stops it starts it again."""
    root = tmp_path_factory.mktemp("prefect-postgres")
    with running(PrefectServer(root, postgres.new_database(), **postgres.environment)) as server:
        yield server


@pytest.fixture
def worker(prefect_server, tmp_path):
    """Start workers in a folder, by default of a pool of the test's own; all end with the test."""
    started = []

    def start(cwd, pool=None, name=None, server=None, **environment):
        name = name or f"worker-{uuid.uuid4().hex[:8]}"
        pool = pool or f"pool-{tmp_path.name}"
        started.append(Worker(tmp_path / "workers", server or prefect_server, pool, name, cwd, **environment))
        started[-1].start()
        return started[-1]

    yield start
    for program in started:
        program.kill()
