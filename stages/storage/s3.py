"""Folders <-> content-addressed objects in a bucket, and plain objects -> a folder; this is the one door to S3.

Below s3://BUCKET/PREFIX of a store lie objects/, named by the sha256 of their content and never changed, and
manifests/, which name the files of one folder. A manifest is written last, so what was pushed by halves is never seen.
Endpoint and credentials come from the usual variables: AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_PROFILE.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from stages.runtime.errors import InputError, UnavailableError, first_line
from stages.runtime.progress import track
from stages.runtime.schema import Frozen, Sha256
from stages.storage.files import check_free, file_sha256, stand_in, writing

BUCKET_URI = r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(/[^?#]*)?"
VARIABLE = "ESPALIER_STORE"
"""Of the environment: s3://BUCKET/PREFIX."""
MIB = 1024 * 1024
PART_BYTES, CONCURRENCY = 16 * MIB, 4
"""Of the transfer manager: it holds no more than their product in memory."""
SERVER_ERROR = 500
"""The first status that is the server's fault."""
FILES_AT_ONCE = 8
"""Small files spend their time waiting for the server."""
SETTINGS = {
    "retries": {"mode": "standard", "total_max_attempts": 6},
    "connect_timeout": 5,
    "read_timeout": 60,
    # Every part is signed with its sha256, which the server compares, over plain HTTP and HTTPS alike.
    "s3": {"payload_signing_enabled": True},
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}
ADVICE = {
    "NoSuchBucket": "there is no such bucket; create it or correct the address",
    "SignatureDoesNotMatch": "the secret is wrong; correct AWS_SECRET_ACCESS_KEY",
    "InvalidAccessKeyId": "the key is unknown; correct AWS_ACCESS_KEY_ID",
    "AccessDenied": "access is denied; ask for the rights to read, write and list",
    "403": "access is denied; check key, secret and rights",
    "404": "there is no such object, or no such bucket",
    "NoSuchKey": "there is no such object",
}


def _is_inside(path: str) -> str:
    pure = PurePosixPath(path)
    odd = "\\" in path or not path.isprintable()
    if pure.is_absolute() or ".." in pure.parts or odd or not pure.parts or str(pure) != path:
        raise ValueError(f"{path!r} leads out of the folder")
    return path


def _is_needless(path: PurePosixPath, names: Sequence[str], better: Mapping[str, str]) -> bool:
    return path.name in better and str(path.with_name(better[path.name])) in names


class Entry(Frozen):
    """One file of a folder."""

    path: Annotated[str, AfterValidator(_is_inside)]
    """Below the folder, with slashes."""
    sha256: Sha256
    size_bytes: int = Field(ge=0)


class Manifest(Frozen):
    """The files of one folder."""

    version: Literal[1] = 1
    files: list[Entry]


class Store:
    """A place in a bucket.

    Args:
        uri: s3://BUCKET or s3://BUCKET/PREFIX.

    Raises:
        InputError: The address is none.
    """

    def __init__(self, uri: str) -> None:
        found = re.fullmatch(BUCKET_URI, uri)
        if not found:
            raise InputError(f"{uri!r} is no address of a bucket; give s3://BUCKET or s3://BUCKET/PREFIX")
        self.uri, self.bucket = uri.rstrip("/"), found[1]
        self.prefix = (found[2] or "").strip("/")
        self.client = _connect()

    def push(self, folder: Path, name: str) -> Manifest:
        """Upload what of a folder is not there yet, then its manifest.

        Args:
            folder: All of its files count.
            name: Of the manifest, for example checkpoints/RUN/step-00000050.

        Raises:
            InputError: The store cannot be reached or written, or holds something else under this name.
        """
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        if not paths:
            raise InputError(f"{folder} holds no files to push")
        manifest = Manifest(files=[describe(path, folder) for path in paths])
        if (there := self._read(name)) is not None:
            if there != manifest:
                raise InputError(f"{self.uri} holds another {name}; what is stored is never changed, take another name")
            return manifest
        for entry in track(manifest.files, f"push {name}, file", len(paths)):
            self._upload(entry, folder)
        with self._errors(name):
            body = manifest.model_dump_json(indent=2).encode()
            self.client.put_object(Bucket=self.bucket, Key=self._key("manifests", f"{name}.json"), Body=body)
        return manifest

    def pull(self, name: str, folder: Path) -> Manifest:
        """Download a folder, whole or not at all; every file is checked against its hash.

        Raises:
            InputError: There is no such folder, an object is missing or damaged, or the place is not free.
        """
        check_free(folder)
        manifest = self._read(name)
        if manifest is None:
            raise InputError(f"{self.uri} holds no {name}")
        with writing(folder) as temporary:
            for entry in track(manifest.files, f"pull {name}, file", len(manifest.files)):
                self._download(entry, temporary / entry.path)
        return manifest

    def names(self, prefix: str = "") -> list[str]:
        """List the folders whose names begin with `prefix`, sorted."""
        root = self._key("manifests", "")
        return sorted(key.removeprefix(root).removesuffix(".json") for key in self._keys(root + prefix))

    @contextmanager
    def downloaded(
        self, patterns: Sequence[str], place: Path, better: Mapping[str, str] | None = None
    ) -> Iterator[Path]:
        """Give a temporary folder with the plain objects below the prefix, as anybody put them there; then it vanishes.

        What the block refuses is told with the address in place of the folder, which nobody can look at afterwards.

        Args:
            patterns: Only keys that fit one of them, in upper or lower case; * stands for slashes too.
            place: Where the folder is made.
            better: Name of a file -> that of one beside it which makes it needless.

        Raises:
            InputError: Nothing fits, a key leads out of the folder, or an object cannot be had.
        """
        with stand_in(self.uri, place) as home:
            paths = self._plain(patterns, better or {})
            with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
                files = pool.map(lambda path: self._get(self._below(path), path, home / path), paths)
                for _ in track(files, f"download {self.uri}, file", len(paths)):
                    pass
            yield home

    def _plain(self, patterns: Sequence[str], better: Mapping[str, str]) -> list[str]:
        """List what lies below the prefix and fits a pattern, as paths, without what something better lies beside."""
        names = [key.removeprefix(self._below("")) for key in self._keys(self._below(""))]
        paths = [name for name in names if any(fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns)]
        paths = [path for path in paths if not _is_needless(PurePosixPath(path), names, better)]
        if not paths:
            found = f"{len(names)} objects, but none of {', '.join(patterns)}" if names else "no objects"
            raise InputError(f"{self.uri} holds {found}; correct the address")
        for path in paths:
            try:
                _is_inside(path)
            except ValueError as error:
                raise InputError(f"an object in {self.uri}: {error}; rename it") from None
        return paths

    def _keys(self, prefix: str) -> list[str]:
        with self._errors("the list"):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def _below(self, path: str) -> str:
        return f"{self.prefix}/{path}" if self.prefix else path

    def _key(self, *parts: str) -> str:
        return "/".join(part for part in (self.prefix, *parts[:-1]) if part) + f"/{parts[-1]}"

    def _object(self, sha256: str) -> str:
        return self._key("objects", sha256[:2], sha256)

    def _upload(self, entry: Entry, folder: Path) -> None:
        with self._errors(entry.path):
            if self._size(entry.sha256) != entry.size_bytes:
                path, key = str(folder / entry.path), self._object(entry.sha256)
                self.client.upload_file(path, self.bucket, key, Config=_transfer())

    def _size(self, sha256: str) -> int | None:
        """Ask for the size of an object; None where there is none."""
        from botocore.exceptions import ClientError

        try:
            return int(self.client.head_object(Bucket=self.bucket, Key=self._object(sha256))["ContentLength"])
        except ClientError as error:
            if error.response["Error"]["Code"] in ("404", "NoSuchKey"):
                return None
            raise

    def _get(self, key: str, what: str, target: Path) -> None:
        with self._errors(what):
            target.parent.mkdir(parents=True, exist_ok=True)
            self.client.download_file(self.bucket, key, str(target), Config=_transfer())

    def _download(self, entry: Entry, target: Path) -> None:
        self._get(self._object(entry.sha256), entry.path, target)
        if (found := file_sha256(target)) != entry.sha256:
            wrong = f"{entry.path} in {self.uri} has sha256 {found}, expected {entry.sha256}"
            raise InputError(f"{wrong}; remove {self._object(entry.sha256)} and push it anew")

    def _read(self, name: str) -> Manifest | None:
        """Read a manifest; None where there is none."""
        _check_name(name)
        from botocore.exceptions import ClientError

        try:
            with self._errors(name, missing_is_an_error=False):
                key = self._key("manifests", f"{name}.json")
                body = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        except ClientError:
            return None
        try:
            return Manifest.model_validate_json(body)
        except ValidationError as error:
            reason = json.dumps(error.errors()[0]["msg"])
            raise InputError(f"the manifest {name} in {self.uri} is damaged ({reason}); push the folder anew") from None

    @contextmanager
    def _errors(self, what: str, *, missing_is_an_error: bool = True) -> Iterator[None]:
        """Turn what boto3 raises into one line."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            NoCredentialsError,
            PartialCredentialsError,
            ProfileNotFound,
        )

        try:
            yield
        except ClientError as error:
            code = str(error.response["Error"]["Code"])
            if code == "NoSuchKey" and not missing_is_an_error:
                raise
            is_down = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= SERVER_ERROR
            kind = UnavailableError if is_down else InputError
            raise kind(f"{what} in {self.uri}: {ADVICE.get(code, first_line(error))}") from None
        except (BotoCoreError, Boto3Error) as error:
            advice = next((text for code, text in ADVICE.items() if f"({code})" in str(error)), None)
            if advice:
                raise InputError(f"{what} in {self.uri}: {advice}") from None
            is_ours = isinstance(error, (NoCredentialsError, PartialCredentialsError, ProfileNotFound))
            kind = InputError if is_ours else UnavailableError
            raise kind(f"{what} in {self.uri}: {first_line(error)}") from None
        except OSError as error:
            raise InputError(f"{what} in {self.uri}: {error.strerror or error}; free some space") from None


def open_store() -> Store | None:
    """Open the store that ESPALIER_STORE names; None where it names none, and everything works without."""
    uri = os.environ.get(VARIABLE)
    return Store(uri) if uri else None


def _check_name(name: str) -> None:
    try:
        _is_inside(name)
    except ValueError as error:
        raise InputError(f"{error}; give a name such as checkpoints/RUN/step-00000050") from None


def describe(path: Path, folder: Path) -> Entry:
    """Name a file of a folder with hash and size."""
    return Entry(path=path.relative_to(folder).as_posix(), sha256=file_sha256(path), size_bytes=path.stat().st_size)


def _connect() -> Any:  # noqa: ANN401  # boto3 makes its classes as it runs
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    try:
        return boto3.session.Session().client("s3", config=Config(**SETTINGS))  # boto3's own session keeps old secrets
    except (BotoCoreError, ValueError) as error:  # an unknown profile, an endpoint that is no address
        raise InputError(f"S3 cannot be used: {first_line(error)}; correct the AWS variables") from None


def _transfer() -> Any:  # noqa: ANN401  # boto3 is imported late
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=CONCURRENCY)
