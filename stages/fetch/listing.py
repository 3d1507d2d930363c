"""The paths of a folder or a bucket -> the images among them, and what is left out."""

import os
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from stages.runtime.errors import InputError

FORMATS = {
    "AVIF": (".avif",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "JPEG2000": (".j2k", ".jp2"),
    "PNG": (".apng", ".png"),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "TGA": (".tga",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
"""Formats that Pillow may decode, and their suffixes; some others, such as EPS, run external programs."""
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
SYSTEM_NAMES = frozenset(
    (
        "$recycle.bin",
        "@eadir",
        "__macosx",
        "desktop.ini",
        "ehthumbs.db",
        "icon\r",
        "system volume information",
        "thumbs.db",
    )
)
"""Files and folders, in lower case, that operating systems add and hide, besides names that begin with a dot."""
MAX_LISTED = 20
"""Names of each kind of left-out files in dataset.json; their number is always complete."""


@dataclass(frozen=True)
class Listing:
    """The images of a folder or bucket and what lies beside them, as names relative to it."""

    images: list[str]
    """In order of folder and file."""
    left_out: dict[str, list[str]]
    """Kind, hidden, not_images or repeated_links -> the names; without empty kinds."""
    folders: list[str] = field(default_factory=list)
    """The folders directly below, hidden ones excepted; empty for a bucket, which has keys only."""

    def about(self) -> dict[str, Any]:
        """Count what was left out, for dataset.json."""
        return {kind: {"count": len(found), "first": found[:MAX_LISTED]} for kind, found in self.left_out.items()}


def sort_names(names: Iterable[str], more: dict[str, list[str]] | None = None, folders: Iterable[str] = ()) -> Listing:
    """Sort paths into images, hidden files or folders, and other files.

    Args:
        names: Paths with slashes; a bucket's markers of folders, which are empty or end with a slash, count as nothing.
        more: Names already left out, by kind.
        folders: The folders directly below the source.
    """
    kinds: dict[str, set[str]] = {kind: set(found) for kind, found in (more or {}).items()}
    images = []
    for name in names:
        if hidden := _hidden_part(name):
            kinds.setdefault("hidden", set()).add(hidden)
        elif PurePosixPath(name).suffix.lower() in SUFFIXES:
            images.append(name)
        elif name and not name.endswith("/"):
            kinds.setdefault("not_images", set()).add(name)
    left_out = {kind: sorted(map(escape_name, found), key=_order) for kind, found in kinds.items() if found}
    return Listing(sorted(images, key=_order), left_out, [name for name in folders if not is_hidden(name)])


def is_hidden(name: str) -> bool:
    """Whether file managers do not show a file or folder of this name."""
    return (name.startswith(".") and name not in {".", ".."}) or name.lower() in SYSTEM_NAMES


def _hidden_part(name: str) -> str | None:
    """Return the path to the first hidden folder or file on the way to `name`; None if all of it is shown."""
    parts = name.split("/")
    depth = next((depth for depth, part in enumerate(parts, 1) if is_hidden(part)), None)
    return "/".join(parts[:depth]) if depth else None


def _order(name: str) -> list[str]:
    return name.split("/")


def escape_name(name: str) -> str:
    """Escape what is not UTF-8 in a file name, since JSON and terminals do not take it."""
    return os.fsencode(name).decode(errors="backslashreplace")


def list_folder(folder: Path, origin: str) -> Listing:
    """List the images below a folder; links are followed, and each file and folder is listed once.

    A file or folder is listed under its own place rather than under a link to it, so a loop of links ends. Hidden
    folders are not entered.

    Args:
        folder: The folder.
        origin: Its name in messages.

    Raises:
        InputError: It does not exist or is a file, or a folder cannot be read.
    """
    if not folder.is_dir():
        found = "is a file; give the folder it is in, or unpack it" if folder.exists() else "does not exist"
        raise InputError(f"image folder {origin} {found}; correct fetch.data.path in params.yaml")
    walk = _Walk()
    try:
        walk.enter(folder, "", os.path.realpath(folder))
        while walk.links:
            walk.follow(*walk.links.popleft())
    except OSError as error:
        found = f"{origin}: the folder {error.filename} cannot be read ({error.strerror})"
        raise InputError(f"{found}; change its permissions or correct fetch.data.path") from None
    more = {"not_images": walk.special, "repeated_links": walk.repeated}
    return sort_names(walk.files, more, walk.folders)


@dataclass
class _Walk:
    """The walk through a folder: real files and folders first, links after them."""

    seen: set[str] = field(default_factory=set)
    """Real paths of all files and folders so far."""
    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)
    """Sockets, pipes and devices, which may block their reader."""
    repeated: list[str] = field(default_factory=list)
    links: deque[tuple[str, str]] = field(default_factory=deque)
    """Path and name of each link that is still to be followed."""

    def enter(self, folder: str | Path, prefix: str, real: str) -> None:
        """List a folder, of the real path `real`, whose entries are named `prefix` and their own name."""
        pending = [(os.fspath(folder), prefix, real)]
        while pending:
            path, prefix, real = pending.pop()
            self.seen.add(real)
            with os.scandir(path) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    name, place = prefix + entry.name, f"{real}/{entry.name}"
                    if is_hidden(entry.name):
                        self.files.append(name)
                    elif entry.is_symlink():
                        self.links.append((entry.path, name))
                    elif place in self.seen:
                        self.repeated.append(name)
                    elif entry.is_dir():
                        self._add_folder(name)
                        pending.append((entry.path, name + "/", place))
                    else:
                        self._add_file(name, place, regular=entry.is_file())

    def follow(self, path: str, name: str) -> None:
        """List what a link leads to, unless it is listed already."""
        target = Path(os.path.realpath(path))
        if target.is_dir():
            self._add_folder(name)
        if str(target) in self.seen:
            self.repeated.append(name)
        elif target.is_dir():
            self.enter(path, name + "/", str(target))
        else:  # a link that leads nowhere is listed like a damaged file
            self._add_file(name, str(target), regular=target.is_file() or not target.exists())

    def _add_folder(self, name: str) -> None:
        if "/" not in name:
            self.folders.append(name)

    def _add_file(self, name: str, real: str, *, regular: bool) -> None:
        self.seen.add(real)
        (self.files if regular else self.special).append(name)
