"""The Prefect server of the environment -> checked once, before a flow is imported."""

import os
from base64 import b64encode
from http import HTTPStatus

from stages.runtime.environment import check_address
from stages.runtime.errors import InputError, UnavailableError, first_line

SECONDS = 5.0
"""Longest wait for the server's answer."""


def find_server() -> str | None:
    """Return the address in PREFECT_API_URL, after checking that a server answers; Prefect would end in a traceback.

    Raises:
        InputError: The address is invalid, or the server refuses the password.
        UnavailableError: The server does not answer.
    """
    check_address("PREFECT_API_URL")
    import httpx
    from prefect.settings import PREFECT_API_URL

    address = os.environ.get("PREFECT_API_URL") or PREFECT_API_URL.value()
    if not address:
        return None
    try:
        httpx.get(f"{address.rstrip('/')}/health", timeout=SECONDS)
        answer = httpx.get(f"{address.rstrip('/')}/admin/version", headers=_authorization(), timeout=SECONDS)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, ValueError) as error:
        raise InputError(f"PREFECT_API_URL is no address ({first_line(error)}); write http://HOST:PORT/api") from None
    except httpx.HTTPError as error:
        reason = first_line(error)
        raise UnavailableError(
            f"the server in PREFECT_API_URL does not answer ({reason}); start it, or correct or unset the variable"
        ) from None
    if answer.status_code == HTTPStatus.UNAUTHORIZED:
        raise InputError(
            "the server in PREFECT_API_URL refuses the password in PREFECT_API_AUTH_STRING; set it to the server's "
            "NAME:PASSWORD, which `python -m flows server` keeps in .espalier/prefect.env"
        )
    return str(address)


def _authorization() -> dict[str, str]:
    """Return the header that Prefect's client sends."""
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY

    if auth := PREFECT_API_AUTH_STRING.value():
        return {"Authorization": f"Basic {b64encode(auth.encode()).decode()}"}
    key = PREFECT_API_KEY.value()
    return {"Authorization": f"Bearer {key}"} if key else {}
