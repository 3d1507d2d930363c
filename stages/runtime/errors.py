"""A user's mistake -> one clear line, exit code 1, and the message in the result file."""

import re
from typing import IO, Any

import click

from stages.runtime.result import write_result

QUERY_KEYS = r"[\w-]*(?:token|secret|password|passwd|signature|credential|key)"
"""Query parameters that grant access, such as those of a presigned address."""


class InputError(click.ClickException):
    """What was found, what is allowed and what to change, in one line.

    Click prints the message and ends the process with exit code 1, without a traceback.
    """

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message, and write it to the result file where one is named."""
        write_result(message=self.message)
        super().show(file)


class UnavailableError(InputError):
    """A server or network does not answer: not a mistake, and a later attempt may succeed.

    The exit code is EX_TEMPFAIL of sysexits.h; a flow retries a command that ends with it.
    """

    exit_code = 75


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, without passwords; the error's type where it has no message."""
    lines = str(error).strip().splitlines()
    return without_password(lines[0]) if lines else type(error).__name__


def without_password(address: str) -> str:
    """Remove secrets from every address in a text: //me:…@host becomes //host, ?token=… becomes ?token=***."""
    bare = re.sub(r"//(?:[^/\s]*@|[^/\s:@]*:(?!\d+/)[^\s@]*@)", "//", address)
    return re.sub(rf"([?&](?:{QUERY_KEYS})=)[^&\s]*", r"\1***", bare, flags=re.IGNORECASE)
