"""The Prefect server of the environment, and proxies between it and a flow."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import prefect
import psutil
import pytest
from click.testing import CliRunner
from prefect.server.api.server import create_ui_app
from prefect.settings import PREFECT_API_AUTH_STRING, temporary_settings
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from flows.__main__ import main
from flows.prefect_command import withhold_second_page
from flows.server import server_environment
from flows.tasks.server import find_server
from stages.runtime.environment import bypass_proxies
from stages.runtime.errors import InputError, UnavailableError
from tests.orchestra import bare_environment, is_alive, until
from tests.servers import ROOT
from tests.swift import free_ports

EVIL = {"Origin": "http://evil.example", "Host": "evil.example"}
OPEN = {("get", "/health"), ("get", "/ready")}
"""Probes of whoever watches the server; they only say that it is up."""
START = "from flows.tasks.temporary_server import start_temporary_server; start_temporary_server()"
FLOW = """
import json, os, time, httpx
from prefect import flow
from prefect.client.orchestration import get_client

@flow(persist_result=False)
def double(number: int) -> int:
    return 2 * number

found = double(21)
with get_client(sync_client=True) as client:
    names = [run.flow_id is not None and run.state.name for run in client.read_flow_runs()]
address = os.environ["PREFECT_API_URL"]
body = {"json": {"name": "x"}}
evil = {"Origin": "http://evil.example"}
print(json.dumps({
    "address": address,
    "found": found,
    "states": names,
    "without password": httpx.post(f"{address}/flows/", **body).status_code,
    "foreign host": httpx.get(f"{address}/health", headers={"Host": "evil.example"}).status_code,
    "cors": [name for name in httpx.get(f"{address}/health", headers=evil).headers if name.startswith("access-")],
}), flush=True)
time.sleep(300)
"""
"""A flow, and what others get from its server, which START starts; it goes on until it is killed."""


def test_a_server_that_does_not_answer_is_one_line(monkeypatch):
    """The line names the variable and the address; it is an outage, so the exit code is 75."""
    (port,) = free_ports(1)
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{port}/api")

    with pytest.raises(UnavailableError, match=rf":{port}/api does not answer: .*PREFECT_API_URL") as caught:
        find_server()
    assert len(caught.value.message.splitlines()) == 1


@pytest.mark.parametrize(
    "address", ["127.0.0.1:4200/api", "http://host:x/api", "http://me:a@b@host/api", " http://host"]
)
def test_an_invalid_address_is_a_mistake(monkeypatch, address):
    """No request is sent, and the exit code is 1."""
    monkeypatch.setenv("PREFECT_API_URL", address)

    with pytest.raises(InputError, match="PREFECT_API_URL") as caught:
        find_server()
    assert not isinstance(caught.value, UnavailableError)


@pytest.mark.parametrize(
    ("status", "text", "kind"),
    [
        (200, "true", None),
        (200, "<html>", InputError),
        (302, "", InputError),
        (401, "true", InputError),
        (404, "true", InputError),
        (500, "true", UnavailableError),
        (503, "true", UnavailableError),
    ],
)
def test_only_a_healthy_prefect_server_counts(monkeypatch, page_server, status, text, kind):
    """Another page or a refusal is a mistake in the address, and an error of the server is an outage."""
    monkeypatch.setenv("PREFECT_API_URL", f"{page_server(status, text)}/api")
    if kind is None:
        assert find_server() == os.environ["PREFECT_API_URL"]
        return
    with pytest.raises(InputError, match="PREFECT_API_URL") as caught:
        find_server()
    assert type(caught.value) is kind
    assert len(caught.value.format_message().splitlines()) == 1


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PREFECT_API_REQUEST_TIMEOUT", "soon"),
        pytest.param("PREFECT_API_ENABLE_HTTP2", "perhaps", marks=pytest.mark.e2e),
        pytest.param("PREFECT_LOGGING_LEVEL", "LOUD", marks=pytest.mark.e2e),
    ],
)
@pytest.mark.parametrize("command", [pytest.param(["compress"], marks=pytest.mark.e2e), ["deploy"]], ids=str)
def test_an_invalid_setting_of_prefect_is_one_line(root, variable, value, command):
    """Prefect reads its variables when it is imported."""
    environment = bare_environment(**{variable: value})
    command = [sys.executable, "-m", "flows", *command]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)

    assert result.returncode == 1
    assert result.stderr.startswith(f"Error: {variable} is no setting of Prefect: input should be ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.e2e
def test_a_proxy_does_not_stand_before_a_server_on_loopback(monkeypatch, prefect_server):
    """With the proxies of a company in the environment, a local server answers."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{prefect_server.uri}/health")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # restored after the test
    bypass_proxies()

    assert httpx.get(f"{prefect_server.uri}/health").status_code == 200


def test_the_server_has_no_second_page(monkeypatch):
    """Its files would ask a foreign host; the first page then has no button that leads there."""
    monkeypatch.setattr(prefect, "__ui_v2_static_path__", prefect.__ui_v2_static_path__)
    with_both = TestClient(create_ui_app(ephemeral=False)).get("/ui-settings").json()
    withhold_second_page()
    client = TestClient(create_ui_app(ephemeral=False))
    settings = client.get("/ui-settings").json()

    assert with_both["available_uis"] == ["v1", "v2"]
    assert (settings["available_uis"], settings["default_ui"], settings["v2_base_url"]) == (["v1"], "v1", None)
    pages = [client.get(path, headers={"Accept": "text/html"}).text for path in ("/v2", "/v2/runs")]
    assert not any("/v2/assets" in page for page in pages)


def test_every_request_needs_the_password(prefect_server):
    """Each path and method of the API is refused without it, and with a wrong one, but for the probes."""
    schema = httpx.get(f"{prefect_server.page}/openapi.json").json()
    asked = [(method, path) for path, methods in schema["paths"].items() for method in methods]
    with httpx.Client(base_url=prefect_server.uri, headers=EVIL) as client:
        answers = {
            (method, path): client.request(method, re.sub(r"{.*?}", "x", path), auth=auth).status_code
            for method, path in asked
            for auth in (None, ("admin", "wrong"))
        }

    assert len(asked) > 100
    assert {asked for asked, status in answers.items() if status != 401} == OPEN


@pytest.mark.parametrize("message", [None, {"type": "auth"}, {"type": "auth", "token": "wrong"}, {"type": "filter"}])
def test_every_socket_needs_the_password(prefect_server, message):
    """A web page may open a socket to any host; it is closed before anything else is read from it."""
    from prefect.server.api.server import API_ROUTERS

    found = [route.path for router in API_ROUTERS for route in router.routes if isinstance(route, WebSocketRoute)]
    assert len(found) >= 5
    for path in found:
        address = f"ws://{urlsplit(prefect_server.uri).netloc}/api{path.format(work_pool_name='x')}"
        with pytest.raises((ConnectionClosed, InvalidStatus), match=r"1008|403"):
            say(address, message)


def say(address, message):
    """Open a socket as a web page would, send a message and wait for an answer."""
    with connect(address, origin=EVIL["Origin"], subprotocols=["prefect"] if message else None) as socket:
        socket.send(json.dumps(message))
        socket.recv(timeout=10)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_another_web_page_reads_and_sends_nothing(prefect_server, origin):
    """Without the header a browser keeps the answer from the page, and refuses a request with a JSON body."""
    wish = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    allowed = httpx.options(f"{prefect_server.uri}/flows/", headers=wish)
    answer = httpx.get(f"{prefect_server.uri}/health", headers={"Origin": origin})

    assert allowed.status_code == 400
    assert "access-control-allow-origin" not in {**allowed.headers, **answer.headers}


def test_its_own_page_may_read_the_answers(prefect_server):
    """The page is served at 127.0.0.1 and localhost, and calls the API at the first."""
    origin = prefect_server.page.replace("127.0.0.1", "localhost")
    answer = httpx.get(f"{prefect_server.uri}/health", headers={"Origin": origin})

    assert answer.headers["access-control-allow-origin"] == origin


def test_a_client_with_the_password_is_served(prefect_server, monkeypatch):
    """Without it, or with a wrong one, one line names the variable before any flow is imported."""
    monkeypatch.setenv("PREFECT_API_URL", prefect_server.uri)
    with temporary_settings({PREFECT_API_AUTH_STRING: prefect_server.auth}):
        assert find_server() == prefect_server.uri
    for auth in (None, "admin:wrong"):
        with (
            temporary_settings({PREFECT_API_AUTH_STRING: auth}),
            pytest.raises(InputError, match="refuses the password in PREFECT_API_AUTH_STRING") as caught,
        ):
            find_server()
        assert caught.value.exit_code == 1


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No setting of Prefect in the environment, and an empty folder for the password."""
    for name in [name for name in os.environ if name.startswith("PREFECT_SERVER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ESPALIER_HOME", str(tmp_path))
    return tmp_path / "prefect.env"


def test_a_password_is_made_once_and_kept_from_others(bare):
    """The file is for the user alone; a client's shell reads it; the next start takes the same password."""
    first, second = server_environment(), server_environment()

    auth = first["PREFECT_SERVER_API_AUTH_STRING"]
    assert len(auth) > 60
    assert second["PREFECT_SERVER_API_AUTH_STRING"] == auth
    assert bare.stat().st_mode & 0o777 == 0o600
    assert bare.read_text() == f"PREFECT_API_URL=http://127.0.0.1:4200/api\nPREFECT_API_AUTH_STRING={auth}\n"
    assert list(bare.parent.iterdir()) == [bare]
    assert first["PREFECT_SERVER_API_HOST"] == "127.0.0.1"


def test_the_printed_command_can_be_pasted(bare, tmp_path, monkeypatch, capsys):
    """Also where the path has what a shell takes apart."""
    folder = tmp_path / "my runs; $HOME"
    monkeypatch.setenv("ESPALIER_HOME", str(folder))
    auth = server_environment()["PREFECT_SERVER_API_AUTH_STRING"]
    command = capsys.readouterr().out.strip().partition("in their shell: ")[2]
    shell = ["bash", "-c", f'{command} && echo "$PREFECT_API_AUTH_STRING"']

    assert not bare.exists()
    assert subprocess.run(shell, capture_output=True, text=True, check=False).stdout == f"{auth}\n"


def test_a_file_that_others_can_read_is_refused(bare):
    """Its password may be known."""
    server_environment()
    bare.chmod(0o640)

    with pytest.raises(InputError, match="can be read by other users; remove it"):
        server_environment()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PREFECT_SERVER_API_AUTH_STRING", "admin:pass", "is not NAME:PASSWORD"),
        ("PREFECT_SERVER_API_AUTH_STRING", "admin:password1234", "is not NAME:PASSWORD"),
        ("PREFECT_SERVER_API_AUTH_STRING", "no-colon-at-all-in-it", "is not NAME:PASSWORD"),
        ("PREFECT_SERVER_API_AUTH_STRING", "admin:twelve letters", "is not NAME:PASSWORD"),
        ("PREFECT_SERVER_API_PORT", "http", "PREFECT_SERVER_API_PORT is 'http'"),
        ("PREFECT_SERVER_API_PORT", "0", "PREFECT_SERVER_API_PORT is '0'"),
        ("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", "*", "trusts every web page"),
        ("PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS", "http://a.example,*", "trusts every web page"),
        ("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", "null", "trusts every web page"),
    ],
)
def test_a_server_that_is_open_does_not_start(bare, monkeypatch, variable, value, message):
    """One line, exit code 1, and no file."""
    monkeypatch.setenv(variable, value)
    result = CliRunner().invoke(main, ["server"])

    assert (result.exit_code, message in result.output, len(result.output.splitlines())) == (1, True, 1)
    assert not bare.exists()


@pytest.fixture
def call(tmp_path):
    """Start Python code in a process of its own, with an empty folder for Prefect; it and its children end."""
    environment = bare_environment(PREFECT_HOME=str(tmp_path), PYTHONPATH=str(ROOT), PREFECT_LOGGING_LEVEL="ERROR")
    started = []

    def begin(code):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        started.append(subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=tmp_path, **pipes))
        return started[-1]

    yield begin
    for process in started:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children():
                child.kill()
        process.kill()
        process.communicate()


def test_a_temporary_server_answers_to_its_own_process_only(call, tmp_path):
    """It needs a password that only the flow has, trusts no web page and no other host, and ends with the flow."""
    caller = call(f"{START}\n{FLOW}")
    found = json.loads(caller.stdout.readline())
    address = urlsplit(found.pop("address"))
    (server,) = psutil.Process(caller.pid).children()
    caller.kill()

    assert found == {
        "found": 42,
        "states": ["Completed"],
        "without password": 401,
        "foreign host": 400,
        "cors": [],
    }
    assert address.hostname == "127.0.0.1"
    assert (tmp_path / "prefect.db").stat().st_mode & 0o077 == 0
    assert until(lambda: not is_alive(server), 30)
    with pytest.raises(httpx.ConnectError):
        httpx.get(address.geturl())


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGKILL,
        *(pytest.param(it, marks=pytest.mark.e2e) for it in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_a_temporary_server_ends_with_its_process(call, number):
    """While it starts, too."""
    caller = call(START)
    (server,) = until(psutil.Process(caller.pid).children, 30)
    caller.send_signal(number)
    caller.wait(30)

    assert until(lambda: not is_alive(server), 30)


def test_no_flow_starts_a_server_without_a_password(tmp_path):
    """A flow that Python calls without a server fails; Prefect would start one that any web page can use."""
    result = subprocess.run(
        [sys.executable, "-c", "from flows.compress import compress; compress(commit=None)"],
        env=bare_environment(PREFECT_HOME=str(tmp_path), PYTHONPATH=str(ROOT)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 1
    assert "No Prefect API URL provided" in result.stderr


def test_nothing_shows_another_way_to_start_a_server():
    """Neither docs nor Makefile nor containers start Prefect's server but by our command."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    shown = [name for name in listed if not name.startswith("tests/") and Path(name).suffix != ".safetensors"]
    texts = {name: (ROOT / name).read_bytes() for name in shown if (ROOT / name).is_file()}

    assert len(texts) > 100
    assert [name for name, text in texts.items() if b"prefect server start" in text] == []
    assert b"espalier server" in texts["compose.yaml"]
    assert b"espalier server" in texts["docs/flows.md"]
