"""A user's mistake -> one clear line and exit code 1."""

import re

import click

QUERY_KEYS = r"[\w-]*(?:token|secret|password|passwd|signature|credential|key)"
"""Parts of a query that let one in, such as those of a presigned address."""


class InputError(click.ClickException):
    """What was found, what is allowed and what to change, in one line.

    Click prints the message and ends the process with exit code 1, without a traceback.
    """


class UnavailableError(InputError):
    """A server or network does not answer: no mistake, and it may work later.

    Its exit code is EX_TEMPFAIL of sysexits.h, by which a flow knows that another try makes sense.
    """

    exit_code = 75


def first_line(error: BaseException) -> str:
    """Say in one line what a library complained about, without passwords; its name where it said nothing."""
    lines = str(error).strip().splitlines()
    return without_password(lines[0]) if lines else type(error).__name__


def without_password(address: str) -> str:
    """Take what is secret out of every address in a text: //me:…@host becomes //host, ?token=… becomes ?token=***."""
    bare = re.sub(r"//(?:[^/\s]*@|[^/\s:@]*:(?!\d+/)[^\s@]*@)", "//", address)
    return re.sub(rf"([?&](?:{QUERY_KEYS})=)[^&\s]*", r"\1***", bare, flags=re.IGNORECASE)
