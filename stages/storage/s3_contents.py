"""A store -> all that it holds, with ages: what folders name, what nothing names, and uploads that never ended."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from stages.runtime.bounded import parse_json
from stages.runtime.errors import InputError
from stages.storage.manifest import MAX_BYTES, Manifest
from stages.storage.s3 import Store
from stages.storage.s3_bucket import Item

OBJECT = r"objects/[0-9a-f]{2}/([0-9a-f]{64})"


@dataclass(frozen=True)
class Folder:
    """A stored folder."""

    item: Item
    """Its manifest."""
    manifest: Manifest


@dataclass(frozen=True)
class UnfinishedUpload:
    """An upload in parts that was neither completed nor aborted; its parts take space and are in no list of objects."""

    item: Item
    """The object that it would have made, with the size of its parts and the time of the last one."""
    upload_id: str


class StoreContents(Store):
    """A store whose contents are listed and removed."""

    def objects(self) -> dict[str, Item]:
        """List the files: SHA-256 -> object. Keys of other forms are not of this store."""
        root = self._key("")
        matches = ((re.fullmatch(OBJECT, item.key.removeprefix(root)), item) for item in self._items(f"{root}objects/"))
        return {match[1]: item for match, item in matches if match}

    def folders(self) -> dict[str, Folder]:
        """Read all manifests: name -> folder.

        Raises:
            InputError: One is damaged, so that the objects it names are unknown.
        """
        found = {}
        for name, item in self._named("manifests/").items():
            if manifest := self._read(name):
                found[name] = Folder(item, manifest)
        return found

    def notes(self) -> dict[str, tuple[Item, Any]]:
        """Read all notes: name -> object and content; the content is None where it is damaged."""
        return {name: (item, self._read_note(item.key)) for name, item in self._named("notes/").items()}

    def unfinished_uploads(self) -> list[UnfinishedUpload]:
        """List the uploads of files that were begun and have not ended."""
        root = self._key("")
        with self._errors("the list of uploads"):
            pager = self.client.get_paginator("list_multipart_uploads")
            pages = pager.paginate(Bucket=self.bucket, Prefix=f"{root}objects/")
            uploads = [upload for page in pages for upload in page.get("Uploads", [])]
            ours = [upload for upload in uploads if re.fullmatch(OBJECT, upload["Key"].removeprefix(root))]
            return [self._with_parts(upload) for upload in ours]

    def abort(self, upload: UnfinishedUpload) -> None:
        """Remove the parts of an upload."""
        with self._errors(upload.item.key):
            where = {"Bucket": self.bucket, "Key": upload.item.key, "UploadId": upload.upload_id}
            self.client.abort_multipart_upload(**where)

    def delete_note(self, name: str) -> None:
        """Delete a note, if there is one."""
        self.delete([self._key(f"notes/{name}.json")])

    def _with_parts(self, upload: Mapping[str, Any]) -> UnfinishedUpload:
        key, upload_id = upload["Key"], upload["UploadId"]
        pages = self.client.get_paginator("list_parts").paginate(Bucket=self.bucket, Key=key, UploadId=upload_id)
        parts = [part for page in pages for part in page.get("Parts", [])]
        last: datetime = max([upload["Initiated"], *(part["LastModified"] for part in parts)])
        return UnfinishedUpload(Item(key, sum(int(part["Size"]) for part in parts), last), upload_id)

    def _named(self, part: str) -> dict[str, Item]:
        root = self._key(part)
        items = (item for item in self._items(root) if item.key.endswith(".json"))
        return {item.key.removeprefix(root).removesuffix(".json"): item for item in items}

    def _read_note(self, key: str) -> Any:  # noqa: ANN401  # JSON may hold anything
        with self._errors(key):
            body = self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read(MAX_BYTES)
        try:
            return parse_json(body)
        except (ValueError, InputError):
            return None
