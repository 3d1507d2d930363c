"""DVC's config of all levels -> DVC's own type, or one line that says why it cannot be read."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configobj import ConfigObj, ConfigObjError
from dvc.config import Config, ConfigError, merge
from dvc.config_schema import Invalid, RelPath

from stages.runtime.errors import InputError, first_line
from stages.storage.files import cannot_write

LINKS = ["reflink", "hardlink", "copy"]
"""DVC's cache.type, if no config has one: links where the file system has them, since data sets may be large."""
NAMED = ("remote", "machine", "db")
"""Kinds of sections that have a name each."""


def read_dvc_config(folder: Path) -> Config:
    """Read the config of a .dvc folder below those of the user and of the machine; paths are absolute.

    Raises:
        InputError: It is no text, has another form, or a value that DVC does not allow.
    """
    with _errors():
        return Config(str(folder))


def write_local_config(folder: Path, origin: Path | None, cache: Path | None) -> bool:
    """Write config.local of a workspace, so that DVC finds what it finds in the repository that was cloned.

    Relative paths of the commit's config are those of the repository. The file may hold secrets, so that only its owner
    may read it.

    Args:
        folder: The .dvc folder of the workspace.
        origin: That of the repository, whose config.local applies here, too; None if it is an address.
        cache: The cache to share; None is that of the repository.

    Returns:
        Whether there is a default remote.

    Raises:
        InputError: As of read_dvc_config.
    """
    path = folder / Config.CONFIG_LOCAL
    try:
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
    except OSError as error:
        raise cannot_write(path, error) from None
    with _errors():
        config = Config(str(folder), validate=False)  # the repository's config.local may hold what it lacks
        local = config.load_one("local")
        if origin:
            _rebase(config.load_one("repo"), local, folder, origin)
            merge(local, Config(str(origin), validate=False).load_one("local"))
        merge(config, local)
        shared = cache or Path(config["cache"].get("dir") or (origin or folder) / "cache")
        local["cache"] |= {"dir": os.path.normpath(shared), "type": config["cache"].get("type") or LINKS}
    _write(local, path)
    return bool(read_dvc_config(folder)["core"].get("remote"))


def _rebase(committed: Mapping[str, Any], local: dict[str, Any], folder: Path, origin: Path) -> None:
    """Copy the relative paths of a commit's config, which DVC resolved in the workspace, as those in the repository."""
    sections = [("cache", "", committed["cache"]), *(("remote", name, it) for name, it in committed["remote"].items())]
    for kind, name, section in sections:
        for key, value in section.items():
            if isinstance(value, RelPath):
                place = local[kind].setdefault(name, {}) if name else local[kind]
                place[key] = os.path.normpath(origin / os.path.relpath(value, folder))


def _write(config: Mapping[str, Any], path: Path) -> None:
    """Write sections in DVC's form; DVC itself cannot write a path beyond ASCII.

    Raises:
        InputError: The file cannot be written.
    """
    named = {f'{kind} "{name}"': section for kind in NAMED for name, section in config[kind].items()}
    others = {kind: section for kind, section in config.items() if kind not in NAMED}
    filled = {name: section for name, section in {**others, **named}.items() if section}
    content = ConfigObj(filled, encoding="utf-8", interpolation=False)
    try:
        with path.open("wb") as file:
            content.write(file)
    except OSError as error:
        raise cannot_write(path, error) from None


@contextmanager
def _errors() -> Iterator[None]:
    """Name the remedy of a config that cannot be read.

    Raises:
        InputError: DVC refuses it.
    """
    try:
        yield
    except (ConfigError, ConfigObjError, Invalid, OSError, TypeError, UnicodeDecodeError) as error:
        reason = "a path with a comma needs quotes" if isinstance(error, TypeError) else first_line(error)
        where = "correct .dvc/config, .dvc/config.local or the user's own"
        raise InputError(f"DVC's config cannot be read ({reason}); {where}") from None
