"""A table of commands -> a group of click that imports a command's module only when the command is used."""

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Any, NamedTuple, cast

import click


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


class LazyCommands(MutableMapping[str, click.Command]):
    """The commands of a table, each imported when it is read."""

    def __init__(self, sections: Sections) -> None:
        self.entries = {name: entry for commands in sections.values() for name, entry in commands.items()}

    def __getitem__(self, name: str) -> click.Command:
        """Import a command; its help ends with the example of the table unless it has one of its own."""
        entry = self.entries[name]
        module, _, attribute = entry.target.partition(":")
        command = cast("click.Command", getattr(import_module(module), attribute))
        command.epilog = command.epilog or f"\b\nExample:\n  {entry.example}"
        return command

    def __setitem__(self, name: str, command: click.Command) -> None:
        """Refuse a command that is not in the table."""
        raise TypeError(f"add {name} to the table of commands")

    def __delitem__(self, name: str) -> None:
        """Remove a command."""
        del self.entries[name]

    def __contains__(self, name: object) -> bool:
        """Whether a command has this name; nothing is imported."""
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        """Yield the names in the order of the table."""
        return iter(self.entries)

    def __len__(self) -> int:
        """Count the commands."""
        return len(self.entries)


class SectionedGroup(click.Group):
    """A group whose help lists the commands below headings, without importing them."""

    def __init__(self, *, sections: Sections, **options: Any) -> None:  # noqa: ANN401  # those of click.Group
        super().__init__(commands=LazyCommands(sections), **options)
        self.sections = sections

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click passes it
        """Return the names in the order of the table."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write every section with its commands; all sections have one column width."""
        width = max(map(len, self.commands))
        for heading, commands in self.sections.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), entry.help) for name, entry in commands.items()])
