"""Plain objects of an S3 bucket -> a folder."""

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from stages.runtime.errors import InputError, without_password
from stages.runtime.progress import track
from stages.storage.files import temporary_folder
from stages.storage.manifest import check_distinct, check_inside
from stages.storage.s3_client import connect, transfer_config
from stages.storage.s3_errors import s3_errors

BUCKET_URI = r"s3://([a-z0-9][a-z0-9._-]{1,61}[a-z0-9])(/[^?#\x00-\x1f\x7f]*)?"
FILES_AT_ONCE = 8
"""Parallel downloads; a small file takes less time to transfer than the server takes to answer."""


@dataclass(frozen=True)
class Item:
    """One object of a bucket."""

    key: str
    size_bytes: int
    modified: datetime
    """When it was written, with its time zone."""


class Bucket:
    """A bucket, or the part of it below a prefix.

    Args:
        uri: s3://BUCKET or s3://BUCKET/PREFIX.
        key: What holds the address, for messages.

    Raises:
        InputError: The address is invalid.
    """

    def __init__(self, uri: str, key: str = "bucket address") -> None:
        match = re.fullmatch(BUCKET_URI, uri)
        if not match:
            raise InputError(f"invalid {key} {without_password(uri)!r}; give s3://BUCKET or s3://BUCKET/PREFIX")
        self.uri, self.bucket = uri.rstrip("/"), match[1]
        self.prefix = (match[2] or "").strip("/")
        self.client = connect()

    @contextmanager
    def downloaded(
        self, patterns: Sequence[str], place: Path, preferred: Mapping[str, str] | None = None
    ) -> Iterator[Path]:
        """Yield a temporary folder with the plain objects below the prefix that match a pattern.

        Plain objects are files that others uploaded under their own names. An InputError of the block names the
        address in place of the folder.

        Args:
            patterns: Patterns of keys, case-insensitive; * also matches slashes.
            place: Parent of the temporary folder.
            preferred: Pattern of file names -> name of the file that is downloaded in their place if both are in one
                folder.

        Raises:
            InputError: No object matches, a key leads out of the folder, or an object cannot be downloaded.
        """
        with self.downloaded_paths(self._matching(patterns, preferred or {}), place) as folder:
            yield folder

    @contextmanager
    def downloaded_paths(self, paths: Sequence[str], place: Path) -> Iterator[Path]:
        """Yield a temporary folder in `place` with the plain objects at some of `paths()`, in the same way.

        Raises:
            InputError: A path leads out of the folder, or an object cannot be downloaded.
        """
        try:
            for path in paths:
                check_inside(path)
            check_distinct(paths)
        except ValueError as error:
            raise InputError(f"an object in {self.uri}: {error}; rename it") from None
        with temporary_folder(self.uri, place) as folder:
            with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
                files = pool.map(lambda path: self._get(self._key(path), path, folder / path), paths)
                for _ in track(files, f"download {self.uri}, file", len(paths)):
                    pass
            yield folder

    def paths(self) -> list[str]:
        """List the keys of the plain objects below the prefix, relative to it.

        Raises:
            InputError: There are none, or the bucket cannot be read.
        """
        paths = [key.removeprefix(self._key("")) for key in self._keys(self._key(""))]
        if not paths:
            raise InputError(f"{self.uri} holds no objects; correct the address")
        return paths

    def _matching(self, patterns: Sequence[str], preferred: Mapping[str, str]) -> list[str]:
        """List the paths below the prefix that match a pattern, without those that a preferred file replaces."""
        names = self.paths()
        paths = [
            name
            for name in names
            if any(fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)
            and not _is_replaced(PurePosixPath(name), names, preferred)
        ]
        if not paths:
            found = f"{len(names)} objects, but none of {', '.join(patterns)}"
            raise InputError(f"{self.uri} holds {found}; correct the address")
        return paths

    def _keys(self, prefix: str) -> list[str]:
        return [item.key for item in self._items(prefix)]

    def _items(self, prefix: str) -> list[Item]:
        with self._errors("the list"):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            found = (item for page in pages for item in page.get("Contents", []))
            return [Item(item["Key"], int(item["Size"]), item["LastModified"]) for item in found]

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix else path

    def _get(self, key: str, name: str, target: Path) -> None:
        with self._errors(name):
            target.parent.mkdir(parents=True, exist_ok=True)
            self.client.download_file(self.bucket, key, str(target), Config=transfer_config())

    def _errors(self, name: str) -> AbstractContextManager[None]:
        return s3_errors(f"{name} in {self.uri}")


def _is_replaced(path: PurePosixPath, names: Sequence[str], preferred: Mapping[str, str]) -> bool:
    better = [name for pattern, name in preferred.items() if fnmatchcase(path.name, pattern) and path.name != name]
    return any(str(path.with_name(name)) in names for name in better)
