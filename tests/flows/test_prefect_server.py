"""The Prefect server of the environment, and proxies between it and a flow."""

import os

import httpx
import pytest

from flows.tasks.server import find_server
from stages.runtime.environment import bypass_proxies
from stages.runtime.errors import InputError, UnavailableError
from tests.swift import free_ports


def test_a_server_that_does_not_answer_is_one_line(monkeypatch):
    """The line names the variable; it is an outage, so the exit code is 75."""
    (port,) = free_ports(1)
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{port}/api")

    with pytest.raises(UnavailableError, match="the server in PREFECT_API_URL does not answer") as caught:
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
