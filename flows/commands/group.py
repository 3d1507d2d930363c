"""A table of commands -> a group of click that imports a command's module only when the command is used."""

import errno
from importlib import import_module
from typing import Any, NamedTuple, cast

import click

from stages.runtime.errors import InputError

UNREACHABLE = (errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)
"""Errors of a path that this user cannot follow."""


class Entry(NamedTuple):
    """A command: where it is, and what the help of the group says about it."""

    target: str
    """module:attribute of a click command."""
    help: str
    """What it does for a person, in a few words."""
    example: str
    """A command line that can be typed as it stands."""


Sections = dict[str, dict[str, Entry]]
"""Heading -> the commands below it: name -> entry."""


class SectionedGroup(click.Group):
    """A group whose help lists the commands below headings, without importing them."""

    def __init__(self, *, sections: Sections, **options: Any) -> None:  # noqa: ANN401  # those of click.Group
        self.entries = {name: entry for commands in sections.values() for name, entry in commands.items()}
        super().__init__(commands={name: click.Command(name) for name in self.entries}, **options)
        self.sections = sections

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click passes it
        """Return the names in the order of the table."""
        return list(self.entries)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a command; its help ends with the example of the table unless it has one of its own."""
        if (entry := self.entries.get(cmd_name)) is None:
            return None
        module, _, attribute = entry.target.partition(":")
        command = cast("click.Command", getattr(import_module(module), attribute))
        command.epilog = command.epilog or f"\b\nExample:\n  {entry.example}"
        return command

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401  # what the command returns
        """Run a command.

        Raises:
            InputError: It came upon a path that this user cannot follow.
        """
        try:
            return super().invoke(ctx)
        except OSError as error:
            if error.errno not in UNREACHABLE or error.filename is None:
                raise
            found = f"{error.filename}: {error.strerror}"
            raise InputError(f"{found}; correct the path or its permissions") from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write every section with its commands; all sections have one column width."""
        width = max(map(len, self.commands))
        for heading, commands in self.sections.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), entry.help) for name, entry in commands.items()])
