"""The environment -> a Prefect server that needs a password and trusts no other web page; it replaces this process."""

import os
import re
import secrets
import shlex
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import click

from flows.tasks.database import create_database
from flows.workspaces.repository import HOME_VARIABLE, make_shared_folder
from stages.runtime.errors import InputError

AUTH_VARIABLE = "PREFECT_SERVER_API_AUTH_STRING"
"""Environment variable: NAME:PASSWORD that every request to the server needs."""
CORS_VARIABLES = ("PREFECT_SERVER_CORS_ALLOWED_ORIGINS", "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS")
"""Environment variables, both read by Prefect: origins of the web pages that may read the server's answers."""
CLIENT_FILE = "prefect.env"
"""File in .espalier with the variables of a client on this machine."""
WELL_KNOWN = re.compile(r"change-me.*|password|password1234|pass", re.IGNORECASE)
MIN_LENGTH = 12
"""Fewest characters of a password."""


def start_server() -> NoReturn:
    """Start Prefect's server in place of this process, on loopback unless PREFECT_SERVER_API_HOST says otherwise.

    The password comes from PREFECT_SERVER_API_AUTH_STRING. Otherwise it is made once, and is in .espalier/prefect.env,
    which only the user can read.

    Raises:
        InputError: The password is short or well known, other users can read the file, or every web page is trusted.
    """
    environment = server_environment()
    create_database()
    command = [sys.executable, "-m", "flows.prefect_command", "--no-prompt", "server", "start"]
    os.execve(sys.executable, command, environment)  # noqa: S606  # no shell is needed


def server_environment() -> dict[str, str]:
    """Return this process's environment with the settings of the server.

    Raises:
        InputError: As of start_server.
    """
    host, port = os.environ.get("PREFECT_SERVER_API_HOST", "127.0.0.1"), _port()
    origins = _origins(port)
    auth = os.environ.get(AUTH_VARIABLE) or ""
    if auth:
        _check(auth, AUTH_VARIABLE)
    else:
        auth = _keep_password(f"http://127.0.0.1:{port}/api")
    return {
        **os.environ,
        AUTH_VARIABLE: auth,
        **dict.fromkeys(CORS_VARIABLES, origins),
        "PREFECT_SERVER_API_HOST": host,
        "PREFECT_SERVER_API_PORT": port,
    }


def _port() -> str:
    port = os.environ.get("PREFECT_SERVER_API_PORT", "4200")
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise InputError(f"PREFECT_SERVER_API_PORT is {port!r}; give a number from 1 to {2**16 - 1}")
    return port


def _origins(port: str) -> str:
    """Return the origins whose scripts may read the server's answers: by default those of its own page."""
    found = {os.environ[name] for name in CORS_VARIABLES if name in os.environ}
    given = ",".join(sorted(found)) or f"http://127.0.0.1:{port},http://localhost:{port}"
    if "*" in given or "null" in given.split(","):
        raise InputError(f"{CORS_VARIABLES[0]} is {given}, which trusts every web page; list origins, or unset it")
    return given


def _check(auth: str, source: str) -> None:
    """Check a NAME:PASSWORD; the message repeats no part of it."""
    name, _, password = auth.partition(":")
    if not name or not re.fullmatch(r"[!-~]*", auth) or len(password) < MIN_LENGTH or WELL_KNOWN.fullmatch(password):
        need = f"NAME:PASSWORD without blanks, with a password of {MIN_LENGTH} characters that is not well known"
        raise InputError(f"{source} is not {need}; make one: openssl rand -hex 32")


def _keep_password(address: str) -> str:
    """Return the password in .espalier/prefect.env, made anew where there is none, and write the file."""
    folder = Path(os.environ.get(HOME_VARIABLE) or ".espalier").resolve()
    make_shared_folder(folder)
    path = folder / CLIENT_FILE
    auth = _read_password(path) or f"espalier:{secrets.token_hex(32)}"
    descriptor, temporary = tempfile.mkstemp(dir=folder)  # which only this user can read
    with os.fdopen(descriptor, "w") as file:
        file.write(f"PREFECT_API_URL={address}\nPREFECT_API_AUTH_STRING={auth}\n")
    Path(temporary).replace(path)
    click.echo(f"Clients need a password; in their shell: set -a && . {shlex.quote(str(path))} && set +a")
    return auth


def _read_password(path: Path) -> str | None:
    if not path.exists():
        return None
    status = path.stat()
    if status.st_mode & 0o077 or status.st_uid != os.getuid():
        raise InputError(f"{path} can be read by other users; remove it, and a new password is made")
    found = re.search("^PREFECT_API_AUTH_STRING=(.*)$", path.read_text(), re.MULTILINE)
    auth = found[1] if found else ""
    _check(auth, f"the password in {path}")
    return auth
