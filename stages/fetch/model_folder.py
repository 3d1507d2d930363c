"""A model folder of others -> what of it is read: known components, and no file that lies elsewhere."""

from itertools import chain
from pathlib import Path

import click

from stages.fetch.weights import LINKED_SUFFIXES, OPTIONAL_COMPONENTS
from stages.models.layout import DENOISERS
from stages.runtime.errors import InputError
from stages.runtime.text import printable
from stages.storage.files import read_json

COMPONENTS = (*DENOISERS, "scheduler", *OPTIONAL_COMPONENTS)
"""The components of a pipeline that are read; of the others nothing enters an output."""
READ_SUFFIXES = {*LINKED_SUFFIXES, ".bin"}


def check_links(folder: Path) -> None:
    """Refuse links out of a model folder, since what they lead to would be copied and released.

    The Hub's cache keeps its files in blobs/ beside snapshots/, to which its links may lead.

    Raises:
        InputError: A file or component that is read lies outside of the folder.
    """
    root = folder.resolve()
    inside = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in chain(_read_files(folder), (folder / name for name in COMPONENTS)):
        if path.is_symlink() and not any(path.resolve().is_relative_to(place) for place in inside):
            raise InputError(f"{path} is a link out of the model folder; put the file itself there")


def _read_files(folder: Path) -> list[Path]:
    files = chain(folder.glob("*"), *((folder / name).glob("*") for name in COMPONENTS))
    return sorted(path for path in files if path.suffix in READ_SUFFIXES)


def announce_left_out(folder: Path) -> None:
    """Print which components of model_index.json are not read; [null, null] marks an absent one."""
    path = folder / "model_index.json"
    index = read_json(path) if path.is_file() else {}
    listed = [name for name, entry in index.items() if isinstance(entry, list) and any(entry) and name[:1] != "_"]
    if others := [printable(name) for name in listed if name not in COMPONENTS]:
        known = ", ".join(COMPONENTS)
        click.echo(
            f"fetch.model: {', '.join(others)} of model_index.json left out; known components: {known}", err=True
        )
