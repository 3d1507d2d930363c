"""The Prefect server of the environment -> checked once, before a flow is imported."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from http import HTTPStatus
from io import StringIO

from pydantic import ValidationError

from stages.runtime.environment import check_prefect
from stages.runtime.errors import InputError, UnavailableError, first_line, without_password
from stages.runtime.network import is_outage

SECONDS = 5.0
"""Longest wait for the server's answer."""


def find_server() -> str | None:
    """Return the address in PREFECT_API_URL, after checking that a server answers; Prefect would end in a traceback.

    Raises:
        InputError: The address is invalid or not that of a Prefect server, or the server refuses the password.
        UnavailableError: The server does not answer.
    """
    check_prefect()
    address = os.environ.get("PREFECT_API_URL") or load_settings()
    if not address:
        return None
    load_settings()
    shown = without_password(address)
    try:
        _check_answers(address)
    except Exception as error:  # noqa: BLE001  # a server that is not Prefect's may give any answer
        reason, response = first_line(error), getattr(error, "response", None)
        if getattr(response, "status_code", None) == HTTPStatus.UNAUTHORIZED:
            raise InputError(
                f"the server in PREFECT_API_URL ({shown}) refuses the password in PREFECT_API_AUTH_STRING; set it to "
                "the server's NAME:PASSWORD, which `espalier server` keeps in .espalier/prefect.env"
            ) from None
        if is_outage(error):
            advice = "start it, or correct or unset PREFECT_API_URL"
            raise UnavailableError(f"the Prefect server {shown} does not answer: {reason}; {advice}") from None
        advice = "correct PREFECT_API_URL (http://HOST:PORT/api)"
        raise InputError(f"{shown} does not answer as a Prefect server does ({reason}); {advice}") from None
    return address


def load_settings() -> str | None:
    """Load the settings of Prefect from its variables and profile; returns the address of the server in them.

    Raises:
        InputError: A setting is invalid; Prefect would end in a traceback when it is imported.
    """
    try:
        with redirect_stderr(StringIO()):  # where Prefect prints the same error on its first import
            from prefect.settings import PREFECT_API_URL

            address = PREFECT_API_URL.value()
    except ValidationError as error:
        fault = error.errors()[0]
        given = (name for name, value in os.environ.items() if name[:8] == "PREFECT_" and value == fault["input"])
        name = next(given, ".".join(map(str, fault["loc"])))
        raise InputError(f"{name} is no setting of Prefect: {fault['msg'].lower()}; correct or unset it") from None
    return str(address) if address else None


def _check_answers(address: str) -> None:
    """Ask for the server's health and, which needs the password, its version, with Prefect's settings of clients.

    Raises:
        Exception: There is no answer, or it is not that of a Prefect server.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    settings = {PREFECT_API_URL: address, PREFECT_CLIENT_MAX_RETRIES: 0}
    with temporary_settings(settings), get_client({"timeout": SECONDS}, sync_client=True) as client:
        for path in ("/health", "/admin/version"):
            response = client.request("GET", path)
            response.raise_for_status()
            response.json()  # the server's user interface answers with a page


@contextmanager
def server_errors() -> Iterator[None]:
    """Translate the errors of Prefect's client inside the block.

    Raises:
        UnavailableError: The server does not answer any more.
        InputError: The server refuses the request.
    """
    from prefect.settings import PREFECT_API_URL

    try:
        yield
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001  # Prefect's client raises exceptions of many kinds
        server = without_password(str(PREFECT_API_URL.value()))
        if is_outage(error):
            raise UnavailableError(f"the Prefect server {server} does not answer: {first_line(error)}") from None
        advice = "correct PREFECT_API_AUTH_STRING or PREFECT_API_KEY"
        raise InputError(f"the Prefect server {server} refuses the request ({first_line(error)}); {advice}") from None
