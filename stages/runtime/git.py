"""Git commands in any repository, without the variables that Git sets for its hooks."""

import os
import re
import subprocess
from pathlib import Path
from urllib.parse import unquote, urlsplit

from stages.runtime.errors import without_password

HOST = r"(\[[^\]]*\]|[^:\[\]]*)(:\d*)?"
"""A host, with a port or without."""
HELPER = '!f() { printf "username=%s\\npassword=%s\\n" "$ESPALIER_GIT_USER" "$ESPALIER_GIT_PASSWORD"; }; f'
"""Git's helper for the credentials of an address, which it prints out of the environment."""


def git_output(folder: Path, *arguments: str, address: str = "") -> str | None:
    """Run git in a folder and return its output without the last newlines; None if it fails or is not installed."""
    code, output, _ = _run(folder, *arguments, address=address)
    return None if code else output.rstrip("\n")


def git_error(folder: Path | None, *arguments: str, address: str = "") -> str:
    """Run git and return its error message in one line, without passwords; empty if it succeeds.

    Args:
        folder: Where git runs; None for the current folder.
        arguments: The git command and its arguments.
        address: An address whose user and password git may need; `without_user` is what an argument may show.
    """
    code, _, message = _run(folder, *arguments, address=address)
    return without_password(" ".join(message.split()) or "git failed") if code else ""


def without_user(address: str) -> str:
    """Return an http address without user and password; every user of the machine sees the arguments of a command.

    A slash in a password must be percent-encoded: after digits, as in me:12/3@host, it cannot be told from a port.
    """
    scheme, separator, rest = address.partition("://")
    authority, slash, path = rest.partition("/")
    if scheme.lower() not in ("http", "https"):
        return address
    if "@" in path and not re.fullmatch(HOST, authority.rpartition("@")[2]):  # a password with a slash in it
        return f"{scheme}{separator}{rest.rpartition('@')[2]}"
    return f"{scheme}{separator}{authority.rpartition('@')[2]}{slash}{path}"


def credential_variables(address: str) -> dict[str, str]:
    """Return the variables with which git sends user and password of an http address to its host, and to no other.

    They come before those that git's helpers know of the host; without a password git looks for that of the user.
    """
    try:
        parts = urlsplit(address)
    except ValueError:  # git complains about the address
        return {}
    if parts.scheme not in ("http", "https") or not parts.username:
        return {}
    section, user = f"credential.{parts.scheme}://{parts.netloc.rpartition('@')[2]}", unquote(parts.username)
    settings = [(f"{section}.username", user)]
    if parts.password is not None:
        settings += [(f"{section}.helper", ""), (f"{section}.helper", HELPER)]  # an empty one removes all others
    variables = {"GIT_CONFIG_COUNT": str(len(settings))}
    for index, (key, value) in enumerate(settings):
        variables |= {f"GIT_CONFIG_KEY_{index}": key, f"GIT_CONFIG_VALUE_{index}": value}
    return {**variables, "ESPALIER_GIT_USER": user, "ESPALIER_GIT_PASSWORD": unquote(parts.password or "")}


def without_git_variables() -> dict[str, str]:
    """Copy the environment without GIT_*.

    Git sets these variables for its hooks; a command for another repository would otherwise change the hook's.
    """
    return {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}


def _run(folder: Path | None, *arguments: str, address: str) -> tuple[int, str, str]:
    """Return exit code, output and error message; code 1 if the folder or git itself is missing."""
    if folder is not None and not folder.is_dir():
        return 1, "", f"{folder} does not exist or is not a folder"
    command = ["git", *(["-C", str(folder)] if folder else []), *arguments]
    try:
        result = subprocess.run(  # noqa: S603
            command,
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",  # a file or name may be in any encoding
            check=False,
            env={**without_git_variables(), **credential_variables(address)},
        )
    except OSError:
        return 1, "", "git is not installed"
    return result.returncode, result.stdout, result.stderr
