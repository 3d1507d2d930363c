"""Variables of the environment -> addresses and credentials that can be used, or one line that names the variable."""

import os
import re
import ssl
from collections.abc import Sequence
from pathlib import Path

from stages.runtime.errors import InputError
from stages.runtime.git import HOST

HOME_VARIABLE = "ESPALIER_HOME"
"""Environment variable: folder that all runs of a machine share; by default each checkout has its own."""
REPOSITORY_VARIABLE = "ESPALIER_REPOSITORY"
"""Environment variable: folder or address that runs are cloned from; by default the current folder."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
DEFAULTS = ("AWS_DEFAULT_PROFILE",)
REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
"""The first that is set counts."""
AWS_FILES = ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_WEB_IDENTITY_TOKEN_FILE")
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
"""Variables of all libraries, also in lower case."""
CERTIFICATES = (
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "AWS_CA_BUNDLE",
    "PREFECT_API_SSL_CERT_FILE",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
)
"""Variables that name a file of certificates, or for requests a folder of them."""
WEB = ("http", "https")
TRACKING = (*WEB, "sqlite", "postgresql", "mysql", "mssql", "file", "databricks", "databricks-uc", "uc")
"""Schemes of MLFLOW_TRACKING_URI; a database's may name a driver, as in postgresql+psycopg2."""


WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
"""Environment variable of the memory that cuBLAS computes in, on which the order of its sums depends."""
KERNELS = (
    "ATEN_CPU_CAPABILITY",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
    "OPENBLAS_L2_SIZE",
    "OPENBLAS_NUM_THREADS",
)
"""Variables that choose the kernels of a CPU, and so the order of sums."""
SHARED_VARIABLE = "ESPALIER_SHARED_MACHINE"
"""A flow sets it where several cells run on one machine at once: the seconds of a command then do not show its cost."""


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
        raise InputError(f"{variable} does not begin with a scheme that is allowed: {known}; write http://HOST:PORT")
    authority = re.split(r"[/?#]", rest.removeprefix("//"), maxsplit=1)[0]
    path = rest.removeprefix("//")[len(authority) :]
    user, at, host = authority.rpartition("@")
    has_port = re.fullmatch(HOST, host)
    is_raw = "@" in user or ("@" in path and (at or ":" in authority))
    if is_raw and scheme not in ("sqlite", "file"):
        advice = "write %2F %40 %23 %3F for / @ # ? in it"
        raise InputError(f"the user or password in {variable} is not percent-encoded; {advice}")
    if not has_port:
        raise InputError(f"the host or port in {variable} is invalid; write SCHEME://HOST:PORT")


def check_credentials() -> None:
    """Check the variables that boto3 reads, before it signs a request with them.

    Raises:
        InputError: A value holds blanks or line breaks, is no address, or names a file that does not exist.
    """
    check_network()
    for variable in (*CREDENTIALS, *DEFAULTS, *REGIONS):
        _check_blanks(variable)
    if os.environ.get("AWS_DEFAULT_REGION") == "":  # boto3 would make an address without a region of it
        raise InputError("AWS_DEFAULT_REGION is empty; set it to a region such as eu-central-1, or unset it")
    for variable in AWS_FILES:
        _check_exists(variable)
    for variable in ENDPOINTS:
        check_address(variable)


def check_tracking() -> None:
    """Check the variables that the client of MLflow reads.

    Raises:
        InputError: MLFLOW_TRACKING_URI is no address, another variable of the network is wrong, or a user, password or
            token has a blank or line break at an end.
    """
    check_address("MLFLOW_TRACKING_URI", TRACKING)
    if os.environ.get("MLFLOW_TRACKING_URI", "").startswith(WEB):
        check_network()
    for variable in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        _check_ends(variable)


def check_prefect() -> None:
    """Check the variables that Prefect's client reads.

    Raises:
        InputError: PREFECT_API_URL is no address, another variable of the network is wrong, or a key or password has a
            blank or line break at an end.
    """
    check_address("PREFECT_API_URL")
    check_network()
    for variable in ("PREFECT_API_KEY", "PREFECT_API_AUTH_STRING"):
        _check_ends(variable)


def check_hub() -> None:
    """Check the variables that the client of the Hugging Face Hub reads.

    Raises:
        InputError: A value holds blanks or line breaks, is no address, or names a file that does not exist.
    """
    check_network()
    check_address("HF_ENDPOINT")
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        _check_blanks(variable)


def check_numbers() -> None:
    """Check the variables that the client of the Hub reads as integers as soon as it is imported.

    Raises:
        InputError: A value is not a number.
    """
    for variable in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        value = os.environ.get(variable, "")
        if value and not re.fullmatch(r"\d+", value):
            raise InputError(f"{variable} is {value!r}; allowed: whole seconds, such as 10")


def check_network() -> None:
    """Check the proxies and files of certificates that all libraries read before they connect.

    Raises:
        InputError: A proxy is no address of HTTP, an entry of NO_PROXY is no host, or a file holds no certificates.
    """
    for name in PROXIES:
        for variable in (name, name.lower()):
            check_address(variable)
    for variable in ("NO_PROXY", "no_proxy"):
        if any(re.search(r"\s|://", entry.strip()) for entry in os.environ.get(variable, "").split(",")):
            raise InputError(f"{variable} is no list of hosts; write them without scheme, with commas: HOST,.DOMAIN")
    for variable in CERTIFICATES:
        _check_certificates(variable)


def _check_ends(variable: str) -> None:
    """Refuse blanks at the ends of a password, which may hold some inside."""
    value = os.environ.get(variable, "")
    if value != value.strip():
        raise InputError(f"{variable} begins or ends with a blank or line break; remove it")


def _check_exists(variable: str) -> None:
    path = os.environ.get(variable)
    if path and not Path(path).exists():
        raise InputError(f"{variable} names a file that does not exist; correct or unset it")


def _check_certificates(variable: str) -> None:
    _check_exists(variable)
    path = Path(os.environ.get(variable, ""))
    if path.is_file():
        try:
            ssl.create_default_context(cafile=path)
        except (OSError, ValueError):  # SSLError is an OSError
            raise InputError(f"{variable} names a file without readable certificates (PEM); correct it") from None


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
