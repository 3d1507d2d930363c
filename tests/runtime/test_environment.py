"""Variables of the environment: checked before anything connects, and never repeated."""

import os

import certifi
import pytest

from stages.runtime.environment import (
    CERTIFICATES,
    PROXIES,
    TRACKING,
    bypass_proxies,
    check_address,
    check_credentials,
    check_hub,
    check_numbers,
    check_prefect,
    check_tracking,
)
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
        ("AWS_CONFIG_FILE", "/nowhere/config"),
        ("AWS_SHARED_CREDENTIALS_FILE", "/nowhere/credentials"),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/nowhere/token"),
        ("AWS_REGION", "eu central-1"),
        ("AWS_DEFAULT_REGION", "eu-central-1\n"),
    ],
)
def test_a_variable_of_s3_is_refused_by_its_name(monkeypatch, variable, value):
    """Before any request is signed; the value is not repeated."""
    monkeypatch.setenv(variable, value)

    with pytest.raises(InputError, match=variable) as caught:
        check_credentials()
    assert value.strip() not in caught.value.message


CHECKS = (check_credentials, check_hub, check_prefect, check_tracking)
"""Each is called before its client connects."""


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        *((name, "/nowhere.pem", "does not exist") for name in CERTIFICATES),
        *((name, "{empty}", "without readable certificates") for name in CERTIFICATES),
        *((name, "proxy.example:3128", "does not begin with a scheme") for name in PROXIES),
        ("http_proxy", "127.0.0.1", "does not begin with a scheme"),
        ("https_proxy", "htp://proxy.example", "does not begin with a scheme"),
        ("ALL_PROXY", "socks5://127.0.0.1:1080", "allowed: http:, https:"),
        ("HTTP_PROXY", "http://me:p@qq@proxy.example", "^the user or password in HTTP_PROXY is not percent-encoded"),
        ("HTTPS_PROXY", "http://proxy.example:port", "^the host or port in HTTPS_PROXY is invalid"),
        ("HTTPS_PROXY", "http://proxy.example:3128\n", "blank or line break"),
        ("NO_PROXY", "http://intern.example", "no list of hosts"),
        ("no_proxy", "one.example two.example", "no list of hosts"),
    ],
)
def test_every_client_refuses_a_wrong_variable_of_the_network(monkeypatch, tmp_path, check, variable, value, reason):
    """The line names the variable and what is allowed, and not the value."""
    (tmp_path / "empty.pem").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    monkeypatch.setenv(variable, value.format(empty=tmp_path / "empty.pem"))

    with pytest.raises(InputError, match=reason if reason.startswith("^") else f"^{variable} .*{reason}"):
        check()


@pytest.mark.parametrize("check", CHECKS)
def test_every_client_accepts_a_correct_network(monkeypatch, tmp_path, check):
    """Files and, for requests, folders of certificates; proxies with a user; hosts, domains and networks."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    for name in CERTIFICATES:
        monkeypatch.setenv(name, certifi.where())
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path))
    for name in PROXIES:
        monkeypatch.setenv(name, "http://me:p%40qq@proxy.example:3128")  # pragma: allowlist secret
    monkeypatch.setenv("NO_PROXY", "localhost, .intern.example,10.0.0.0/8,[::1],*.example,")
    check()


@pytest.mark.parametrize(
    ("check", "variable"),
    [
        (check_hub, "HF_TOKEN"),
        (check_tracking, "MLFLOW_TRACKING_TOKEN"),
        (check_tracking, "MLFLOW_TRACKING_PASSWORD"),
        (check_tracking, "MLFLOW_TRACKING_USERNAME"),
        (check_prefect, "PREFECT_API_KEY"),
        (check_prefect, "PREFECT_API_AUTH_STRING"),
    ],
)
def test_a_line_break_behind_a_secret_is_refused(monkeypatch, check, variable):
    """As in a secret that echo made; libraries would repeat the secret in their message."""
    monkeypatch.setenv(variable, "hunter2\n")

    with pytest.raises(InputError, match=variable) as caught:
        check()
    assert "hunter2" not in caught.value.message


@pytest.mark.parametrize("variable", ["HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"])
def test_a_time_limit_of_the_hub_is_whole_seconds(monkeypatch, variable):
    """Its client reads them when it is imported, and would end in a traceback."""
    for value in ("x", "1.5", "-1", " 3"):
        monkeypatch.setenv(variable, value)
        with pytest.raises(InputError, match=variable):
            check_numbers()
    monkeypatch.setenv(variable, "10")
    check_numbers()


def test_a_database_needs_no_proxy(monkeypatch, tmp_path):
    """The variables of the network do not matter to MLflow in a file."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("HTTPS_PROXY", "nonsense")
    check_tracking()


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
