"""Variables of the environment: checked before anything connects, and never repeated."""

import os

import pytest

from stages.runtime.environment import TRACKING, bypass_proxies, check_address, check_credentials
from stages.runtime.errors import InputError


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:5000",
        "https://host/mlflow",
        "https://host/a@b",
        "http://me:p%40qq@host:80/x",  # pragma: allowlist secret
        "http://[::1]:5000",
        "sqlite:////tmp/a_b@c#%41/mlflow.db",
        "postgresql+psycopg2://me:secret@host:5432/db",  # pragma: allowlist secret
        "databricks",
        "",
    ],
)
def test_an_address_is_accepted(monkeypatch, address):
    """Percent-encoded passwords, ports, IPv6, drivers and paths with any letters."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    check_address("MLFLOW_TRACKING_URI", TRACKING)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:5000", "does not begin with a scheme"),
        ("host.example.org", "does not begin with a scheme"),
        ("htp://host", "does not begin with a scheme"),
        (" http://host", "holds a blank or line break"),
        ("http://host\n", "holds a blank or line break"),
        ("http://me:p@qq/w#rd@127.0.0.1:9", "not percent-encoded"),
        ("http://me:p/qq@127.0.0.1:9", "not percent-encoded"),
        ("http://me:hunter#2@host", "not percent-encoded"),
        ("http://me:p@qq@host", "not percent-encoded"),
        ("http://me:12/34qq@host", "not percent-encoded"),
        ("postgresql://me:p@qq@host/db", "not percent-encoded"),
        ("http://host:port", "host or port"),
        ("http://[::1", "host or port"),
    ],
)
def test_an_address_is_refused_by_the_name_of_its_variable(monkeypatch, address, reason):
    """The line names the variable and repeats nothing of the value."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)

    with pytest.raises(InputError, match=reason) as caught:
        check_address("MLFLOW_TRACKING_URI", TRACKING)
    assert "MLFLOW_TRACKING_URI" in caught.value.message
    assert not any(part in caught.value.message for part in ("qq", "hunter", "127.0.0.1:9"))


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AWS_ACCESS_KEY_ID", "test:tester\n"),
        ("AWS_SECRET_ACCESS_KEY", "secret\r"),
        ("AWS_SESSION_TOKEN", " token"),
        ("AWS_ENDPOINT_URL_S3", "http://host:9000 "),
        ("AWS_ENDPOINT_URL", "host:9000"),
        ("AWS_CA_BUNDLE", "/nowhere.pem"),
    ],
)
def test_a_variable_of_s3_is_refused_by_its_name(monkeypatch, variable, value):
    """Before any request is signed; the value is not repeated."""
    monkeypatch.setenv(variable, value)

    with pytest.raises(InputError, match=variable) as caught:
        check_credentials()
    assert value.strip() not in caught.value.message


def test_a_star_stays_alone(monkeypatch):
    """It means that no host has a proxy, but only alone."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    bypass_proxies()

    assert os.environ["NO_PROXY"] == "*"


def test_loopback_needs_no_proxy(monkeypatch):
    """The hosts of both spellings are kept, and loopback is added once."""
    monkeypatch.setenv("NO_PROXY", "intern.example, localhost")
    monkeypatch.setenv("no_proxy", "other.example")
    bypass_proxies()
    bypass_proxies()

    assert os.environ["NO_PROXY"] == os.environ["no_proxy"]
    assert os.environ["NO_PROXY"] == "intern.example,localhost,other.example,127.0.0.1,::1"
