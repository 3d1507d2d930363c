"""Variables of the environment -> addresses and credentials that can be used, or one line that names the variable."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from stages.runtime.errors import InputError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION")
DEFAULTS = ("AWS_DEFAULT_PROFILE", "AWS_DEFAULT_REGION")
CERTIFICATES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
WEB = ("http", "https")
TRACKING = (*WEB, "sqlite", "postgresql", "mysql", "mssql", "file", "databricks", "databricks-uc", "uc")
"""Schemes of MLFLOW_TRACKING_URI; a database's may name a driver, as in postgresql+psycopg2."""


def check_address(variable: str, schemes: Sequence[str] = WEB) -> None:
    """Check the address in a variable, which may be unset.

    Args:
        variable: Name of the variable.
        schemes: Allowed schemes.

    Raises:
        InputError: The value holds blanks, has no or another scheme, or holds a user name or password that is not
            percent-encoded. The message names the variable and repeats no part of the value.
    """
    address = os.environ.get(variable, "")
    if not address:
        return
    _check_blanks(variable)
    scheme, colon, rest = address.partition(":")
    known = ", ".join(f"{name}:" for name in schemes)
    if not colon or not re.fullmatch(r"[a-z][a-z0-9-]*(\+\w+)?", scheme) or scheme.partition("+")[0] not in schemes:
        if address in schemes:  # databricks alone is an address of MLflow
            return
        raise InputError(f"{variable} does not begin with a scheme; allowed: {known} for example http://HOST:PORT")
    authority = re.split(r"[/?#]", rest.removeprefix("//"), maxsplit=1)[0]
    path = rest.removeprefix("//")[len(authority) :]
    user, at, host = authority.rpartition("@")
    has_port = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(:\d*)?", host)
    is_raw = "@" in user or ("@" in path and (at or ":" in authority))
    if is_raw and scheme not in ("sqlite", "file"):
        advice = "write %2F %40 %23 %3F for / @ # ? in it"
        raise InputError(f"the user or password in {variable} is not percent-encoded; {advice}")
    if not has_port:
        raise InputError(f"the host or port in {variable} is invalid; write SCHEME://HOST:PORT")


def check_credentials() -> None:
    """Check the variables that boto3 reads, before it signs a request with them.

    Raises:
        InputError: A value holds blanks or line breaks, or a file of certificates does not exist.
    """
    for variable in (*CREDENTIALS, *DEFAULTS):
        _check_blanks(variable)
    for variable in CERTIFICATES:
        path = os.environ.get(variable)
        if path and not Path(path).exists():
            raise InputError(f"{variable} names a file that does not exist; correct or unset it")
    for variable in ENDPOINTS:
        check_address(variable)


def _check_blanks(variable: str) -> None:
    value = os.environ.get(variable, "")
    if re.search(r"\s", value) or not value.isprintable():
        raise InputError(f"{variable} holds a blank or line break; remove it (echo adds one, printf does not)")


def bypass_proxies() -> None:
    """Let this process and its children reach servers on loopback without a proxy, whatever proxies are set."""
    values = [os.environ.get(name, "") for name in ("NO_PROXY", "no_proxy")]
    if "*" in values:  # no host has a proxy
        return
    hosts = dict.fromkeys([host.strip() for value in values for host in value.split(",") if host.strip()])
    merged = ",".join([*hosts, *(host for host in LOOPBACK if host not in hosts)])
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = merged
