"""Model versions in MLflow's registry: find, create, tag, download, and set aliases."""

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stages.runtime.errors import InputError
from stages.runtime.text import printable
from stages.tracking import mlflow_client
from stages.tracking.mlflow_client import errors

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
CONTENT = "espalier.content"
"""Tag: the sha256 of files.json, which holds the sha256 of every other file of the version."""
GATE, GATE_REASON = "espalier.gate", "espalier.gate_reason"
"""Tags: the latest decision of the gate, passed or refused, and its reason."""
PASSED, REFUSED = "passed", "refused"
WITHDRAWN = "espalier.withdrawn"
"""Tag of a version that was rolled back: by whom, when and why."""
OURS = "finetuned"
"""The model of a compression that becomes a version."""
MODEL, EVIDENCE = mlflow_client.MODEL, "artifacts/evidence"
"""Folders of a version: the diffusers pipeline, and the files that the gate checks."""
URI = r"models:/([^/@]+)(?:/(\d{1,9})|@([\w-]+))"


class Registry:
    """The model registry of the tracking server.

    Every method raises InputError in one line if the server refuses a request, UnavailableError if it does not answer.
    """

    def __init__(self) -> None:
        with errors("cannot be opened"):
            self.client = mlflow_client.connect()

    def find(self, uri: str) -> "ModelVersion":
        """Find models:/NAME/3 or models:/NAME@champion."""
        version = self.look_up(uri)
        if version is None:
            raise InputError(f"the registry has no {uri}; it has {self._describe(_split(uri)[0])}")
        return version

    def look_up(self, uri: str) -> "ModelVersion | None":
        """Find models:/NAME/3 or models:/NAME@champion; None if it does not exist."""
        name, number, alias = _split(uri)
        return self.by_alias(name, alias) if alias else self._by_number(name, number)

    def by_alias(self, name: str, alias: str) -> "ModelVersion | None":
        """Find the version that an alias points to; None if the model or the alias does not exist."""
        return _get(f"{name}@{alias}", lambda: self.client.get_model_version_by_alias(name, alias))

    def _by_number(self, name: str, number: str) -> "ModelVersion | None":
        return _get(f"{name}/{number}", lambda: self.client.get_model_version(name, number))

    def versions(self, name: str) -> "list[ModelVersion]":
        """List the versions of a model, the newest first; empty if the model does not exist."""
        check_name(name)
        with errors(f"failed to list {name}"):
            found: list[ModelVersion] = []
            token = None
            while True:
                page = self.client.search_model_versions(f"name = '{name}'", page_token=token)
                found += page
                token = page.token
                if not token:
                    return sorted(found, key=lambda version: -int(version.version))

    def create(self, name: str, source: str, run_id: str | None, tags: Mapping[str, str], text: str) -> "ModelVersion":
        """Create a version; the server gives each a number of its own.

        Args:
            name: Name of the model, which is created if it does not exist.
            source: Address of the version's files.
            run_id: MLflow run of the version.
            tags: Tags of the version.
            text: Description of the version.
        """
        self.create_model(name)
        with errors(f"failed to create a version of {name}"):
            return self.client.create_model_version(name, source, run_id, dict(tags), description=text)

    def create_model(self, name: str) -> None:
        """Create a model without versions if it does not exist; its creator owns it."""
        from mlflow.exceptions import MlflowException

        check_name(name)
        with errors(f"failed to create the model {name}"):
            try:
                self.client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise

    def now_ms(self, name: str) -> int:
        """Ask the server for its time, in ms since the epoch.

        MLflow has no call for that: the model's description is written again, unchanged, and the answer says when.
        """
        with errors(f"failed to update {name}"):
            text = self.client.get_registered_model(name).description
            return int(self.client.update_registered_model(name, text).last_updated_timestamp)

    def remove(self, version: "ModelVersion") -> None:
        """Delete a version if it still exists."""
        with errors(f"failed to delete {version.name}/{version.version}"):
            if self._by_number(version.name, str(version.version)) is not None:
                self.client.delete_model_version(version.name, version.version)

    def download(self, version: "ModelVersion", folder: Path) -> Path:
        """Download the files of a version into `folder`, as MLflow does for every client; returns their folder."""
        import mlflow

        with errors(f"failed to download {version.name}/{version.version}"):
            files = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri_of(version), dst_path=str(folder)))
            for compiled in files.rglob("__pycache__"):  # left by processes that loaded the version from a local store
                shutil.rmtree(compiled)
            return files

    def tag(self, version: "ModelVersion", **tags: str) -> None:
        """Set tags of a version; the keyword KEY sets espalier.KEY."""
        with errors(f"failed to tag {version.name}/{version.version}"):
            for key, value in tags.items():
                self.client.set_model_version_tag(version.name, version.version, f"espalier.{key}", value)

    def set_alias(self, name: str, alias: str, number: str | None) -> None:
        """Point an alias to the version with this number; None deletes the alias."""
        with errors(f"failed to set {name}@{alias}"):
            if number is None:
                self.client.delete_registered_model_alias(name, alias)
            else:
                self.client.set_registered_model_alias(name, alias, number)

    def _describe(self, name: str) -> str:
        numbers = [str(version.version) for version in self.versions(name)]
        return f"{name} in versions {', '.join(reversed(numbers))}" if numbers else f"no model {name}"


def uri_of(version: "ModelVersion") -> str:
    """Return the address of a version: models:/NAME/3."""
    return f"models:/{version.name}/{version.version}"


def refusal_reason(version: "ModelVersion") -> str | None:
    """Return why the latest decision of the gate refused a version; None unless it was refused."""
    return printable(version.tags.get(GATE_REASON, "")) if version.tags.get(GATE) == REFUSED else None


def _get(what: str, request: "Callable[[], ModelVersion]") -> "ModelVersion | None":
    """Send a request for a version; None if the server answers that it does not exist."""
    from mlflow.exceptions import MlflowException

    with errors(f"failed to find {what}"):
        try:
            return request()
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def _split(uri: str) -> tuple[str, str, str]:
    """Split the address of a version into name, number and alias, one of which is empty."""
    match = re.fullmatch(URI, uri)
    if not match:
        raise InputError(f"invalid version {uri!r}: expected models:/NAME/3 or models:/NAME@champion")
    name, number, alias = match.groups(default="")
    check_name(name)
    return name, number, alias


def check_name(name: str) -> None:
    """Refuse names that MLflow's URIs cannot contain."""
    if not re.fullmatch(r"[\w.-]+(?: [\w.-]+)*", name):
        raise InputError(f"invalid model name {name!r}; use letters, digits, dots, dashes and underscores")
