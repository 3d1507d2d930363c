"""A part of a bucket -> named objects that several machines share, and claims that lapse with their owner."""

import hashlib
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import Any

from stages.runtime.errors import InputError
from stages.storage.s3 import CONFLICT, NOT_IMPLEMENTED, PRECONDITION_FAILED
from stages.storage.s3_bucket import Bucket

CONTROL = ".job"
"""Folder of the files that say what is done, beside what was made."""
NOT_FOUND = 404
BEAT_S, LAPSE_S = 20.0, 120.0
"""The owner of a claim renews it so often; a claim that was not renewed for so long is free."""
PIECE_BYTES = 1024 * 1024


class BucketPlace(Bucket):
    """The objects below a prefix, each written by one request.

    A claim is an object that its owner renews while it works. The server's own clock tells how old it is. On a server
    without conditional writes two workers may take one claim at the same moment; what they write is equal.
    """

    def read(self, name: str) -> bytes | None:
        """Read an object; None if it does not exist."""
        with self._errors(name):
            try:
                body = self.client.get_object(Bucket=self.bucket, Key=self._key(name))["Body"]
                return bytes(body.read())
            except self.client.exceptions.NoSuchKey:
                return None

    def sizes(self) -> dict[str, int]:
        """List all objects below the prefix: name -> size in bytes."""
        root = self._key("")
        return {item.key.removeprefix(root): item.size_bytes for item in self._items(root)}

    def sha256(self, name: str) -> str:
        """Download an object that exists, piece by piece, and hash it."""
        digest = hashlib.sha256()
        with self._errors(name):
            body = self.client.get_object(Bucket=self.bucket, Key=self._key(name))["Body"]
            for piece in body.iter_chunks(PIECE_BYTES):
                digest.update(piece)
        return digest.hexdigest()

    def create(self, name: str, content: bytes) -> bool:
        """Write an object unless it exists."""
        return self._put_if(name, content, IfNoneMatch="*")

    def write(self, name: str, content: bytes) -> None:
        """Write an object by one request."""
        with self._errors(name):
            self.client.put_object(Bucket=self.bucket, Key=self._key(name), Body=content)

    def remove(self, name: str) -> None:
        """Remove an object, if it exists."""
        with self._errors(name):
            self.client.delete_object(Bucket=self.bucket, Key=self._key(name))

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Take the claim of a name, renew it while the block lasts, and give it back."""
        key, owner, ended = f"{CONTROL}/claims/{name}", uuid.uuid4().hex.encode(), threading.Event()
        if not self._take(key, owner):
            yield False
            return
        beat = threading.Thread(target=self._renew, args=(key, owner, ended), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            ended.set()
            beat.join()
            with suppress(InputError):  # it lapses
                if self.read(key) == owner:  # otherwise it lapsed, and is another's now
                    self.remove(key)

    def _take(self, key: str, owner: bytes) -> bool:
        if self.create(key, owner):
            return True
        found = self._age(key)
        if found is None or found[1] < LAPSE_S:
            return False
        return self._put_if(key, owner, IfMatch=found[0])

    def _age(self, key: str) -> tuple[str, float] | None:
        """Return the ETag of an object and its age in seconds by the server's clock; None if it does not exist."""
        with self._errors(key):
            try:
                found = self.client.head_object(Bucket=self.bucket, Key=self._key(key))
            except self.client.exceptions.ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] == NOT_FOUND:
                    return None
                raise
            now = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
            return str(found["ETag"]), (now - found["LastModified"]).total_seconds()

    def _renew(self, key: str, owner: bytes, ended: threading.Event) -> None:
        """Write the claim anew until the work has ended, or another worker has it because this one was stopped."""
        while not ended.wait(BEAT_S):
            with suppress(InputError):  # an outage; the next attempt may succeed
                if self.read(key) != owner:
                    return
                self.write(key, owner)

    def _put_if(self, name: str, content: bytes, **condition: Any) -> bool:  # noqa: ANN401  # IfMatch or IfNoneMatch
        """Write an object if the condition holds; returns whether this content is the stored one.

        A request that botocore repeats because its answer was lost finds its own content.
        """
        with self._errors(name):
            try:
                self.client.put_object(Bucket=self.bucket, Key=self._key(name), Body=content, **condition)
            except self.client.exceptions.ClientError as error:
                status, code = error.response["ResponseMetadata"]["HTTPStatusCode"], error.response["Error"]["Code"]
                if status in (NOT_FOUND, CONFLICT, PRECONDITION_FAILED) and code != "NoSuchBucket":
                    return self.read(name) == content
                if status != NOT_IMPLEMENTED:
                    raise
            else:
                return True
        if "IfNoneMatch" in condition and (found := self.read(name)) is not None:
            return found == content
        self.write(name, content)
        return self.read(name) == content
