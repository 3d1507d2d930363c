"""Folders <-> content-addressed objects in an S3 bucket.

A store at s3://BUCKET/PREFIX has three parts: objects/ holds files, named by the SHA-256 of their content and never
changed; manifests/ lists the files of each folder; notes/ holds small JSON objects, which are replaced. A manifest is
written last, so an interrupted push stays invisible.
Endpoint and credentials come from the standard variables AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY and AWS_PROFILE.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from stages.runtime.errors import InputError, UnavailableError
from stages.runtime.progress import track
from stages.storage.files import check_free, file_sha256, writing
from stages.storage.manifest import (
    MAX_BYTES,
    Entry,
    Manifest,
    check_name,
    check_space,
    describe,
    parse_manifest,
)
from stages.storage.s3_bucket import Bucket
from stages.storage.s3_client import transfer_config

CONFLICT, PRECONDITION_FAILED, NOT_IMPLEMENTED = 409, 412, 501
"""Answers to a conditional write: another one is in progress, was first, or the store does not know conditions."""
CONFLICTS = 3
"""Most attempts to write a manifest that others write at the same time."""
VARIABLE = "ESPALIER_STORE"
"""Environment variable with the address of the store, s3://BUCKET/PREFIX."""


class Store(Bucket):
    """Folders in a bucket, or in the part of it below a prefix.

    Args:
        uri: s3://BUCKET or s3://BUCKET/PREFIX.
        key: What holds the address, for messages.

    Raises:
        InputError: The address is invalid.
    """

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

    def remove(self, names: Iterable[str], among: str = "") -> None:
        """Remove stored folders: their manifests, then those of their objects that no other manifest names.

        Args:
            names: The folders.
            among: Beginning of the names of all folders that may share objects with them.

        Raises:
            InputError: A manifest is damaged, so that its objects are unknown, or the store refuses.
        """
        gone = set(names)
        found = {name: self._read(name) for name in {*self.names(among), *gone}}
        hashes = {name: {entry.sha256 for entry in stored.files} for name, stored in found.items() if stored}
        self.delete(self._key(f"manifests/{name}.json") for name in sorted(gone))
        used = set().union(*(found for name, found in hashes.items() if name not in gone))
        freed = set().union(*(hashes.get(name, set()) for name in gone)) - used
        self.delete(self._object(sha256) for sha256 in sorted(freed))

    def write_note(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a small JSON object beside the folders, in place of an older one; its age says when it was written."""
        with self._errors(name):
            body = json.dumps(content, indent=2, sort_keys=True).encode()
            self.client.put_object(Bucket=self.bucket, Key=self._key(f"notes/{name}.json"), Body=body)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects by their whole keys; those that do not exist are no error.

        Raises:
            InputError: The store refuses, or cannot be reached.
        """
        for key in keys:
            with self._errors(key):
                self.client.delete_object(Bucket=self.bucket, Key=key)

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


def open_store() -> Store | None:
    """Open the store that ESPALIER_STORE names; None if the variable is not set."""
    uri = os.environ.get(VARIABLE)
    return Store(uri, VARIABLE) if uri else None
