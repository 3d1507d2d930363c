"""Retries of S3: from Amazon's own variables, or ours."""

import pytest

from stages.runtime.errors import InputError
from stages.storage.s3_client import connect

VARIABLES = ("AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE")


@pytest.fixture(autouse=True)
def credentials(monkeypatch):
    """Credentials, and no variable of the retries."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9000")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"mode": "standard", "total_max_attempts": 6}),
        ({"AWS_MAX_ATTEMPTS": "2"}, {"mode": "standard", "total_max_attempts": 2}),
        ({"AWS_RETRY_MODE": "adaptive"}, {"mode": "adaptive", "total_max_attempts": 6}),
    ],
)
def test_the_variables_decide(monkeypatch, values, expected):
    """Each by itself."""
    for name, value in values.items():
        monkeypatch.setenv(name, value)

    assert connect().meta.config.retries == expected


@pytest.mark.parametrize(
    ("name", "value"), [("AWS_MAX_ATTEMPTS", "0"), ("AWS_MAX_ATTEMPTS", "many"), ("AWS_RETRY_MODE", "often")]
)
def test_a_wrong_value_is_refused(monkeypatch, name, value):
    """By name, before anything is sent."""
    monkeypatch.setenv(name, value)

    with pytest.raises(InputError, match=f"{name} is '{value}'"):
        connect()
