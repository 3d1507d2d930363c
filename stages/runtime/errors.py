"""A user's mistake -> one clear line, exit code 1, and the message in the result file."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from stages.runtime.result import write_result
from stages.runtime.text import printable

QUERY_KEYS = (
    r"[\w-]*(?:token|secret|password|passwd|pwd|signature|credential|key|keyid|auth|jwt|policy)|sig|sas|code|pass"
)
"""Query parameters that grant access, such as those of a presigned address."""
HEADER_KEYS = r"x-amz-[\w-]+|signature|credential|[\w-]*(?:token|secret|password|passwd)"
"""Fields of a signed request."""
CODE_ERRORS = (Exception, SystemExit)
"""What the code of others may raise; a SystemExit that nobody catches ends the program as if it had done its work."""
SECONDS_FOR_FIRST = 3.0
"""Seconds that the first of several processes has to find the same mistake."""
MAX_LENGTH = 300
"""Most characters of a message on the terminal and in logs."""


class SignalExit(SystemExit):
    """The end of this process after a signal; handlers of what the code of others raises let it pass."""

    is_signal = True
    """What files that travel with models, and import nothing of this project, know it by."""


class InputError(click.ClickException):
    """What was found, what is allowed and what to change, in one line.

    Click prints the message and ends the process with exit code 1, without a traceback.
    """

    def format_message(self) -> str:
        """Return the message as `shown` does."""
        return shown(self.message)

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message, and write it to the result file where one is named.

        Of several processes with the same mistake the first prints it, and the launcher ends the others meanwhile.
        """
        if os.environ.get("RANK", "0") != "0":
            time.sleep(SECONDS_FOR_FIRST)
        write_result(message=self.format_message())
        super().show(file)


class UnavailableError(InputError):
    """A server or network does not answer: not a mistake, and a later attempt may succeed.

    The exit code is EX_TEMPFAIL of sysexits.h; a flow retries a command that ends with it.
    """

    exit_code = 75


class MachineError(InputError):
    """This machine cannot do the work, such as for a full disk: no fault of what it works on, so nothing is decided."""


def shown(text: str) -> str:
    """Return a text as terminals and logs may show it: in one line of at most 300 characters.

    A name or the answer of a server may hold line breaks, escape sequences and other characters that are not printed;
    they are written as in Python. The middle of a long text is left out, since its end says what to change.
    """
    half = MAX_LENGTH // 2 - 2
    line = printable(text)
    return line if len(line) <= MAX_LENGTH else f"{line[:half]} … {line[-half:]}"


def warn(message: str) -> None:
    """Print a warning in one line."""
    click.echo(f"Warning: {shown(message)}", err=True)


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, without passwords; the error's type where it has no message."""
    lines = str(error).strip().splitlines()
    return without_password(lines[0]) if lines else type(error).__name__


def described(error: BaseException) -> str:
    """Return the type of an exception and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)}"


@contextmanager
def refusing_code(what: str) -> Iterator[None]:
    """Refuse whatever the code of others raises inside of the block, but an interrupt and its own refusal.

    Args:
        what: The code, which the message begins with: WHAT raises ValueError: no width.

    Raises:
        InputError: It raises an exception, of whatever class, also one that would end the program.
    """
    try:
        yield
    except (KeyboardInterrupt, SignalExit, InputError):
        raise
    except BaseException as error:  # noqa: BLE001  # classes of exceptions are anyone's, too
        raise InputError(f"{what} raises {described(error)}") from None


def without_password(address: str) -> str:
    """Remove secrets from a text: //me:…@host becomes //host, ?token=… becomes ?token=***.

    A password may hold / @ # and ? although they should be encoded: everything up to the last @ is removed then.
    """
    bare = re.sub(r"//(?:[^/\s:@]*:\S*@|[^/\s]*@)", "//", address)
    bare = re.sub(rf"([?&;#](?:{QUERY_KEYS})=)[^&\s'\"]*", r"\1***", bare, flags=re.IGNORECASE)
    bare = re.sub(rf"((?<![\w-])(?:{HEADER_KEYS})=)[^&\s,'\"]+", r"\1***", bare, flags=re.IGNORECASE)
    return re.sub(r"(authorization['\"]?\s*[:=]\s*)['\"]?(\w+ )?[^\s'\",]+", r"\1***", bare, flags=re.IGNORECASE)
