"""A user's mistake -> one clear line and exit code 1."""

import click


class InputError(click.ClickException):
    """What was found, what is allowed and what to change, in one line.

    Click prints the message and ends the process with exit code 1, without a traceback.
    """
