"""A user's mistake -> one clear line and exit code 1."""

import re

import click


class InputError(click.ClickException):
    """What was found, what is allowed and what to change, in one line.

    Click prints the message and ends the process with exit code 1, without a traceback.
    """


def first_line(error: BaseException) -> str:
    """Say in one line what a library complained about, without passwords; its name where it said nothing."""
    lines = str(error).strip().splitlines()
    return without_password(lines[0]) if lines else type(error).__name__


def without_password(address: str) -> str:
    """Take user and password out of every address in a text: //me:…@host becomes //host."""
    return re.sub(r"//[^/\s]*@", "//", address)
