"""Folders <-> content-addressed objects in an S3 bucket, and plain objects -> a folder.

A store at s3://BUCKET/PREFIX has two parts: objects/ holds files, named by the SHA-256 of their content and never
changed; manifests/ lists the files of each folder. A manifest is written last, so an interrupted push stays invisible.
Endpoint and credentials come from the standard variables AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY and AWS_PROFILE.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import click

from stages.runtime.errors import InputError, UnavailableError, without_password
from stages.runtime.progress import track
from stages.storage.files import check_free, file_sha256, temporary_folder, writing
from stages.storage.manifest import (
    MAX_BYTES,
    Entry,
    Manifest,
    check_distinct,
    check_inside,
    check_name,
    check_space,
    describe,
    parse_manifest,
)
from stages.storage.s3_client import connect, transfer_config
from stages.storage.s3_errors import s3_errors

BUCKET_URI = r"s3://([a-z0-9][a-z0-9._-]{1,61}[a-z0-9])(/[^?#\x00-\x1f\x7f]*)?"
CONFLICT, PRECONDITION_FAILED, NOT_IMPLEMENTED = 409, 412, 501
"""Answers to a conditional write: another one is in progress, was first, or the store does not know conditions."""
CONFLICTS = 3
"""Most attempts to write a manifest that others write at the same time."""
VARIABLE = "ESPALIER_STORE"
"""Environment variable with the address of the store, s3://BUCKET/PREFIX."""
FILES_AT_ONCE = 8
"""Parallel downloads; a small file takes less time to transfer than the server takes to answer."""


class Store:
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

    def push(self, folder: Path, name: str) -> Manifest:
        """Upload those files of a folder that the store does not hold, then its manifest.

        Args:
            folder: A folder with at least one file; files of its subfolders are included.
            name: Name of the manifest, for example checkpoints/RUN/step-00000050.

        Raises:
            InputError: The store cannot be reached or written, or holds another folder under this name.
        """
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        if not paths:
            raise InputError(f"{folder} holds no files to push")
        manifest = Manifest(files=[describe(path, folder) for path in paths])
        if self._holds(name, manifest):
            return manifest
        for entry in track(manifest.files, f"push {name}, file", len(paths)):
            self._upload(entry, folder)
        self._write(name, manifest)
        return manifest

    def pull(self, name: str, folder: Path) -> Manifest:
        """Download a folder and compare every file with its hash; after an error, `folder` is as it was.

        Raises:
            InputError: The store holds no such folder, an object is missing or damaged, or `folder` holds files that
                no stage wrote.
        """
        check_free(folder)
        manifest = self._read(name)
        if manifest is None:
            raise InputError(f"{self.uri} holds no {name}")
        check_space(manifest, folder, f"{name} in {self.uri}")
        with writing(folder) as temporary:
            for entry in track(manifest.files, f"pull {name}, file", len(manifest.files)):
                self._download(entry, temporary / entry.path)
        return manifest

    def names(self, prefix: str = "") -> list[str]:
        """List the stored folders whose names begin with `prefix`, sorted."""
        root = self._key("manifests/")
        return sorted(key.removeprefix(root).removesuffix(".json") for key in self._keys(root + prefix))

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
        with self._errors("the list"):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def _key(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix else path

    def _object(self, sha256: str) -> str:
        return self._key(f"objects/{sha256[:2]}/{sha256}")

    def _upload(self, entry: Entry, folder: Path) -> None:
        with self._errors(entry.path):
            if self._size_bytes(entry.sha256) != entry.size_bytes:
                self.client.upload_file(
                    str(folder / entry.path), self.bucket, self._object(entry.sha256), Config=transfer_config()
                )

    def _size_bytes(self, sha256: str) -> int | None:
        """Return the size of an object; None if it does not exist."""
        try:
            return int(self.client.head_object(Bucket=self.bucket, Key=self._object(sha256))["ContentLength"])
        except self.client.exceptions.ClientError as error:
            if error.response["Error"]["Code"] in ("404", "NoSuchKey"):
                return None
            raise

    def _get(self, key: str, name: str, target: Path) -> None:
        with self._errors(name):
            target.parent.mkdir(parents=True, exist_ok=True)
            self.client.download_file(self.bucket, key, str(target), Config=transfer_config())

    def _download(self, entry: Entry, target: Path) -> None:
        key = self._object(entry.sha256)
        with self._errors(entry.path):
            size_bytes = self._size_bytes(entry.sha256)
        if size_bytes != entry.size_bytes:
            advice = f"it has {size_bytes} bytes, expected {entry.size_bytes}; remove {key} and push the folder again"
            found = "there is no such object" if size_bytes is None else advice
            raise InputError(f"{entry.path} in {self.uri}: {found}")
        self._get(key, entry.path, target)
        if (found := file_sha256(target)) != entry.sha256:
            raise InputError(
                f"{entry.path} in {self.uri} has sha256 {found}, expected {entry.sha256}; "
                f"remove {key} and push the folder again"
            )

    def _read(self, name: str) -> Manifest | None:
        """Read a manifest; None if it does not exist."""
        check_name(name)
        key = self._key(f"manifests/{name}.json")
        with self._errors(name):
            try:
                body = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read(MAX_BYTES + 1)
            except self.client.exceptions.NoSuchKey:
                return None
        try:
            return parse_manifest(body)
        except ValueError as error:
            advice = f"remove {key} and push the folder again"
            raise InputError(f"the manifest {name} in {self.uri} is damaged ({error}); {advice}") from None

    def _holds(self, name: str, manifest: Manifest) -> bool:
        """Return whether a manifest is stored under its name.

        Raises:
            InputError: Another one is.
        """
        stored = self._read(name)
        if stored is not None and stored != manifest:
            found = f"{self.uri} holds another folder {name}"
            raise InputError(f"{found}; a stored folder is never changed, choose another name")
        return stored is not None

    def _write(self, name: str, manifest: Manifest) -> None:
        """Write a manifest unless another writer was first; of a store without conditional writes the last one wins.

        Raises:
            InputError: Another writer has stored another folder under this name.
        """
        body = {
            "Bucket": self.bucket,
            "Key": self._key(f"manifests/{name}.json"),
            "Body": manifest.model_dump_json(indent=2).encode(),
        }
        for _ in range(CONFLICTS):
            with self._errors(name):
                try:
                    self.client.put_object(**body, IfNoneMatch="*")
                except self.client.exceptions.ClientError as error:
                    status = error.response["ResponseMetadata"]["HTTPStatusCode"]
                    if status not in (CONFLICT, PRECONDITION_FAILED, NOT_IMPLEMENTED):
                        raise
                else:
                    return
            if status == NOT_IMPLEMENTED:
                self._overwrite(name, manifest, body)
                return
            if self._holds(name, manifest):
                return
        raise UnavailableError(f"{name} in {self.uri} is being written by others; try again")

    def _overwrite(self, name: str, manifest: Manifest, body: Mapping[str, Any]) -> None:
        with self._errors(name):
            self.client.put_object(**body)
        if self._read(name) != manifest:
            found = f"{self.uri} has no conditional writes, and another writer has replaced {name} meanwhile"
            click.echo(f"Warning: {found}; its folder is the one that is stored", err=True)

    def _errors(self, name: str) -> AbstractContextManager[None]:
        return s3_errors(f"{name} in {self.uri}")


def open_store() -> Store | None:
    """Open the store that ESPALIER_STORE names; None if the variable is not set."""
    uri = os.environ.get(VARIABLE)
    return Store(uri, VARIABLE) if uri else None


def _is_replaced(path: PurePosixPath, names: Sequence[str], preferred: Mapping[str, str]) -> bool:
    better = [name for pattern, name in preferred.items() if fnmatchcase(path.name, pattern) and path.name != name]
    return any(str(path.with_name(name)) in names for name in better)
