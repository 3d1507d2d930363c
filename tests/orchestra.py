"""A real Prefect server and real process workers on loopback, which tests may stop, kill and start again."""

import contextlib
import json
import secrets
import signal
import subprocess
import time
import uuid
from base64 import b64encode
from http import HTTPStatus
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import psutil
import pytest

from tests.servers import own_environment, running
from tests.swift import BIN, free_ports

MARK = "ORCHESTRA_MARK"
"""Every program of this module and all that it starts carry it in their environment."""
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
    "PREFECT_SERVER_UI_V2_ENABLED": "false",  # that one calls amplitude.com, whatever the settings say
}
"""Cron runs are there within two seconds, a run that waits for another asks again every two, not every thirty."""
WORKER = {
    "PREFECT_WORKER_HEARTBEAT_SECONDS": "2",
    "PREFECT_WORKER_PREFETCH_SECONDS": "1",
    "PREFECT_WORKER_QUERY_SECONDS": "1",
}
"""Work is fetched every second, not every ten."""


def bare_environment(**changes):
    """Give this process's environment without what it says of any server, Prefect's included, and with changes."""
    return {key: value for key, value in own_environment().items() if not key.startswith("PREFECT_")} | changes


def until(reached, seconds=60, every=0.1):
    """Wait until a condition holds: what it returned, which is false where it never did."""
    deadline = time.monotonic() + seconds
    while not (found := reached()) and time.monotonic() < deadline:
        time.sleep(every)
    return found


def descendants(mark):
    """List the living processes that carry a mark, whoever their parent is by now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Program:
    """A command in a session of its own, marked together with all that it starts."""

    def __init__(self, command, cwd, log, environment):
        self.command, self.cwd, self.log = command, cwd, log
        self.process, self.command_lines, self.mark = None, set(), uuid.uuid4().hex
        self.environment = {**environment, MARK: self.mark}

    def start(self, seconds=120):
        """Start it, and wait until it works."""
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
        works = until(lambda: self.process.poll() is not None or self.works(self.said(begin)), seconds)
        assert works, f"{self.log} after {seconds} s: {self.said(begin)}"
        assert self.process.poll() is None, self.said(begin)
        self.note_command_lines()

    def works(self, said):
        """Whether it is ready, by what it said since its start or otherwise."""
        raise NotImplementedError

    def said(self, begin=0):
        """Read its log, from a byte on."""
        return self.log.read_bytes()[begin:].decode(errors="replace")

    def note_command_lines(self):
        """Add those that `ps` would show now."""
        for process in descendants(self.mark):
            with contextlib.suppress(psutil.Error):
                self.command_lines.add(" ".join(process.cmdline()))

    def orphans(self):
        """List what it started and what still lives, itself not counted."""
        own = self.process.pid if self.process else None
        return [process for process in descendants(self.mark) if process.pid != own]

    def stop(self, how=signal.SIGTERM, seconds=60):
        """Ask it alone to end, and wait for it: its exit code; nothing where it does not run."""
        if self.process is None:
            return None
        self.process.send_signal(how)
        exit_code = self.process.wait(seconds)
        self.process = None
        return exit_code

    def strike(self):
        """End it alone, at once, as the kernel does when memory is short: nothing else is told."""
        if self.process:
            self.process.kill()
            self.process.wait()
        self.process = None

    def kill(self):
        """End it and all that it started, wherever that is, at once."""
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
        root: A folder for its log and, unless told otherwise, for everything it keeps.
        backend: The database, postgresql://user@host:port/name as Postgres.new_database() gives it.
        environment: What the database needs; also overrides any setting.
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
            "PREFECT_SERVER_API_AUTH_STRING": self.auth,
            "PREFECT_SERVER_API_PORT": str(self.port),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": backend.replace("postgresql://", "postgresql+asyncpg://"),
            "PREFECT_SERVER_UI_API_URL": self.uri,
            "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(root / "ui"),  # else it writes into its own package
        }
        self.client_home = root / "client"
        command = [PREFECT, "server", "start"]
        super().__init__(command, root, root / "prefect.log", bare_environment(**settings) | environment)

    @property
    def uri(self):
        """Where its API is."""
        return f"http://127.0.0.1:{self.port}/api"

    @property
    def page(self):
        """Where its user interface is."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def password(self):
        """The secret half of what every request needs."""
        return self.auth.partition(":")[2]

    def client_environment(self):
        """What a client of it needs."""
        return {
            **QUIET,
            "PREFECT_API_AUTH_STRING": self.auth,
            "PREFECT_API_URL": self.uri,
            "PREFECT_HOME": str(self.client_home),
        }

    def works(self, said):  # noqa: ARG002
        """Whether it answers."""
        return self.answers()

    def answers(self):
        """Whether it is there, its database included."""
        with contextlib.suppress(URLError, OSError), urlopen(f"{self.uri}/ready", timeout=5) as answer:
            return answer.status == 200
        return False

    def ask(self, path, body=None, method=None):
        """Ask as its user, again while SQLite is busy: what it answers, from JSON; without a body it reads."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.uri}/{path}", data, {"Content-Type": "application/json"}, method=method)
        request.add_header("Authorization", f"Basic {b64encode(self.auth.encode()).decode()}")
        deadline = time.monotonic() + 60
        while True:
            try:
                with urlopen(request, timeout=60) as answer:
                    content = answer.read()
                return json.loads(content) if content else None
            except HTTPError as error:
                if error.code != HTTPStatus.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                    raise AssertionError(f"{path}: {error.code} {error.read().decode()}") from None
                time.sleep(0.5)

    def cli(self, *arguments, cwd=None, **environment):
        """Run `prefect` as its client: the finished process, with what it said."""
        return subprocess.run(
            [PREFECT, *arguments],
            cwd=cwd or self.cwd,
            env=bare_environment(**self.client_environment()) | environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def submit(self, deployment, **parameters):
        """Ask for a run of a deployment, flow/name: the run's id."""
        found = self.ask(f"deployments/name/{deployment}")
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return self.ask(f"deployments/{found['id']}/create_flow_run", body)["id"]

    def state(self, run):
        """Read the state of a run: its name, such as Completed, or Late, which is of type SCHEDULED."""
        return self.ask(f"flow_runs/{run}")["state"]["name"]

    def wait(self, run, seconds=120):
        """Wait until a run is over: the name of its state then."""
        over = {"CANCELLED", "COMPLETED", "CRASHED", "FAILED"}
        until(lambda: self.ask(f"flow_runs/{run}")["state"]["type"] in over, seconds)
        return self.state(run)

    def states(self, run):
        """List all the states that a run went through, oldest first: dictionaries."""
        return sorted(self.ask(f"flow_run_states/?flow_run_id={run}"), key=lambda state: state["timestamp"])

    def lines(self, run):
        """List what a run logged, oldest first."""
        begin, found = 0, []
        while True:
            logs = {"flow_run_id": {"any_": [run]}}
            page = self.ask("logs/filter", {"logs": logs, "sort": "TIMESTAMP_ASC", "offset": begin, "limit": 200})
            if not page:
                return found
            found += [line["message"] for line in page]
            begin += len(page)

    def cancel(self, run):
        """Ask for the end of a run, as the button of the user interface does."""
        body = {"state": {"type": "CANCELLING", "name": "Cancelling"}, "force": False}
        return self.ask(f"flow_runs/{run}/set_state", body)["status"]


class Worker(Program):
    """A process worker of a pool, which it makes where there is none.

    Args:
        root: A folder for its log and home.
        server: The PrefectServer that it asks for work.
        pool: Name of the pool.
        name: Its own name.
        cwd: Where it is started; flows without a place of their own run elsewhere, in temporary folders.
        environment: What the flows need; also overrides any setting.
    """

    def __init__(self, root, server, pool, name, cwd, **environment):
        root.mkdir(parents=True, exist_ok=True)
        settings = {**server.client_environment(), **WORKER, "PREFECT_HOME": str(root / "home")}
        command = [PREFECT, "worker", "start", "--type", "process", "--pool", pool, "--name", name]
        super().__init__(command, cwd, root / f"{name}.log", bare_environment(**settings) | environment)
        self.name = name

    def works(self, said):
        """Whether it asks for work."""
        return f"Worker '{self.name}' started!" in said


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory):
    """The running Prefect over SQLite; whoever stops it starts it again."""
    with running(PrefectServer(tmp_path_factory.mktemp("prefect"))) as server:
        yield server


@pytest.fixture(scope="session")
def full_prefect_server(postgres, tmp_path_factory):
    """The running Prefect over PostgreSQL; whoever stops it starts it again."""
    root = tmp_path_factory.mktemp("prefect-postgres")
    with running(PrefectServer(root, postgres.new_database(), **postgres.environment)) as server:
        yield server


@pytest.fixture
def worker(prefect_server, tmp_path):
    """Start workers in a folder, of a pool that is the test's own unless told otherwise; all end with the test."""
    started = []

    def start(cwd, pool=None, name=None, server=None, **environment):
        name = name or f"worker-{uuid.uuid4().hex[:8]}"
        pool = pool or f"pool-{tmp_path.name}"
        started.append(Worker(tmp_path / "workers", server or prefect_server, pool, name, cwd, **environment))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.kill()
