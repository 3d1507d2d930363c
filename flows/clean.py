"""What trainings and runs left behind on disk and in the store -> a table, and with --delete the space."""

import re
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.runtime.errors import InputError
from stages.runtime.wording import format_bytes, format_table

if TYPE_CHECKING:
    from stages.tools.leftovers import Leftover

UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
SHORTEST = timedelta(days=1)
"""A training on another machine may go without a checkpoint for some hours, and only its age shows that it runs."""


def parse_age(_context: click.Context, _param: click.Parameter, text: str) -> timedelta:
    """Parse an age such as 7d, 36h or 2w.

    Raises:
        InputError: It is no such age, or too short.
    """
    match = re.fullmatch(r"(\d{1,4})([hdw])", text)
    if not match or (age := int(match[1]) * UNITS[match[2]]) < SHORTEST:
        raise InputError(f"--older-than {text!r}; give hours, days or weeks such as 36h, 7d or 2w, at least 1d")
    return age


@click.command()
@click.option("--older-than", "age", default="7d", callback=parse_age, help="Keep what is younger; at least 1d.")
@click.option("--delete", is_flag=True, help="Remove what the table lists; without it nothing is removed.")
def clean(age: timedelta, *, delete: bool) -> None:
    """List checkpoints, grid cells, incomplete uploads and workspaces that nothing needs, here and in ESPALIER_STORE.

    What a running training, a lock or the current params.yaml or dvc.lock may need stays, and so does every version.
    """
    found = find(datetime.now(UTC) - age)
    removable = [leftover for leftover in found if leftover.reason_to_keep is None]
    for line in table(removable, datetime.now(UTC)):
        click.echo(line)
    removed = [leftover for leftover in removable if leftover.remove()] if delete else removable
    kept = Counter(leftover.reason_to_keep for leftover in found if leftover.reason_to_keep)
    rest = "; ".join(f"{count} stay {reason}" for reason, count in sorted(kept.items()))
    verb = "removed" if delete else "to remove with --delete"
    total = sum(leftover.size_bytes for leftover in removed)
    click.echo(f"{len(removed)} {verb}, {format_bytes(total)}" + (f"; {rest}" if rest else ""))


def find(since: datetime) -> "list[Leftover]":
    """List everything that takes space in the current checkout, the workspaces and the store.

    Raises:
        InputError: The current folder is no project.
    """
    from flows.workspaces.leftovers import find_workspaces
    from flows.workspaces.repository import Repository
    from flows.workspaces.workspace import current_checkout
    from stages.storage.s3 import VARIABLE, open_store
    from stages.storage.s3_contents import StoreContents
    from stages.tools.leftovers import (
        Needed,
        current_trainings,
        find_cells,
        find_checkpoints,
        find_in_store,
        find_sums,
        held_trainings,
    )

    here = current_checkout().path
    repository = Repository.find()
    checkouts = {here, *([Path(repository.origin).resolve()] if repository.is_local else [])}
    workspaces = list((repository.root / "workspaces").glob("*/"))
    needed = Needed(frozenset().union(*map(current_trainings, checkouts)), since)
    found = [
        leftover
        for checkout in sorted(checkouts)
        for find_kind in (find_checkpoints, find_sums, find_cells)
        for leftover in find_kind(checkout, needed)
    ]
    found += find_workspaces(repository, needed)
    if store := open_store():
        held = set().union(*(held_trainings(place) for place in (*checkouts, *workspaces)))
        found += find_in_store(StoreContents(store.uri, VARIABLE), needed, held)
    return found


def table(leftovers: "Sequence[Leftover]", now: datetime) -> list[str]:
    """Return lines in columns: what, which, how big, how old, why it can go; none for nothing."""
    header = ("what", "which", "size", "age", "why it can go")
    rows = [
        (it.kind, it.name, format_bytes(it.size_bytes), f"{(now - it.modified) / UNITS['d']:.0f} d", it.why)
        for it in leftovers
    ]
    return format_table(header, rows) if rows else []
