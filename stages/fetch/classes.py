"""The folders of images -> their classes; classes and model -> whether they fit."""

import re
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

from stages.data.images import Table
from stages.fetch.listing import Listing
from stages.fetch.source_images import SourceImages
from stages.runtime.bounded import MIB, read_bounded
from stages.runtime.errors import InputError
from stages.runtime.text import printable
from stages.runtime.wording import count

MAX_NAMES_BYTES = MIB
"""Largest file of class names."""


def with_classes(images: SourceImages, listing: Listing, names_path: Path | None) -> SourceImages:
    """Add the class of each image, the first folder in its name.

    Args:
        images: The images of a folder or bucket.
        listing: What was found there.
        names_path: A text file with the name of one folder per line, in the order of the class numbers. None numbers
            the folders in natural order: class2 before class10.

    Raises:
        InputError: An image is in no class folder, a folder has no images, or the names are not those of the folders.
    """
    parts = [name.partition("/") for name in images.names]
    if loose := [name for name, slash, _ in parts if not slash]:
        found = f"{images.origin}/{loose[0]} is in no class folder"
        raise InputError(f"{found}; move it into one, or remove fetch.data.labels")
    if twice := [name for name in listing.left_out.get("repeated_links", []) if "/" not in name]:
        found = f"{images.origin}/{twice[0]} leads to images of another class folder"
        raise InputError(f"{found}, but each folder is a class; remove the link")
    folders = {folder for folder, _, _ in parts}
    if empty := sorted(set(listing.folders) - folders):
        raise InputError(f"{images.origin}/{empty[0]} has no images, but each folder is a class; remove it")
    classes = _read_names(names_path, folders, images.origin) if names_path else _natural(folders)
    numbers = {name: number for number, name in enumerate(classes)}
    return replace(images, labels=np.array([numbers[folder] for folder, _, _ in parts], np.int64), classes=classes)


def _natural(folders: set[str]) -> list[str]:
    """Sort names with the numbers in them by value; say so where alphabetical order differs."""
    ordered = sorted(folders, key=lambda name: ([_by_value(part) for part in re.split(r"(\d+)", name)], name))
    if ordered != (alphabetical := sorted(folders)):
        at = next(at for at, pair in enumerate(zip(ordered, alphabetical, strict=True)) if pair[0] != pair[1])
        numbered = f"class {at} is {ordered[at]}, in alphabetical order {alphabetical[at]}"
        click.echo(
            f"Classes are numbered in natural order: {printable(numbered)}; fetch.data.classes gives another order",
            err=True,
        )
    return ordered


def _by_value(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdecimal() else (-1, part)


def _read_names(path: Path, folders: set[str], origin: str) -> list[str]:
    try:
        lines = [line.strip() for line in read_bounded(path, MAX_NAMES_BYTES).decode("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"fetch.data.classes: {path} is not a readable text file ({error}); correct it") from None
    names = [line for line in lines if line]
    if twice := [name for at, name in enumerate(names) if name in names[:at]]:
        raise InputError(f"fetch.data.classes: {path} has {twice[0]} twice; give each class folder once")
    if unknown := sorted(set(names) - folders):
        raise InputError(f"fetch.data.classes: {path} has {unknown[0]}, which is no folder with images in {origin}")
    if missing := sorted(folders - set(names)):
        raise InputError(f"fetch.data.classes: {path} lacks the folder {missing[0]} of {origin}; add it")
    return names


def check_labels(images: SourceImages, table: Table | None) -> None:
    """Check that a class-conditional model has a valid class for each image, and an unconditional one has no classes.

    Raises:
        InputError: Classes are missing, unexpected or out of range.
    """
    labels = images.labels
    if table is None:
        if labels is not None:
            raise InputError("fetch.data.labels is set, but the model is unconditional; remove it")
        return
    num_classes = len(table) - 1
    if labels is None:
        found = f"{images.origin} has no classes, but the model has {num_classes}"
        raise InputError(f"{found}; set fetch.data.labels, or choose a source with classes")
    if wrong := [int(label) for label in (labels.min(), labels.max()) if not 0 <= label < num_classes]:
        found = f"{images.origin} has an image of class {wrong[0]}; the model has classes 0 to {num_classes - 1}"
        raise InputError(f"{found}; correct fetch.data.labels or the images")
    if images.classes and len(images.classes) != num_classes:
        found = f"{images.origin} has {count(len(images.classes), 'class', 'classes')}, the model {num_classes}"
        raise InputError(f"{found}; classes are numbered in order, so provide all of them")
