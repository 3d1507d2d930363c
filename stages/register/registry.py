"""Names of models -> their versions in MLflow's registry, as a user finds them."""

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stages.runtime.errors import InputError
from stages.tracking import mlflow_client
from stages.tracking.mlflow_client import errors

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
CONTENT, GATE, WITHDRAWN = "espalier.content", "espalier.gate", "espalier.withdrawn"
"""Tags: the sha256 of files.json, which holds that of every other file; what the gate said; who rolled it back."""
OURS = "finetuned"
"""Which model of a compression becomes a version."""
MODEL, EVIDENCE = mlflow_client.MODEL, "artifacts/evidence"
"""Folders of a version: what diffusers opens, and what proves it."""
URI = r"models:/([^/@]+)(?:/(\d{1,9})|@([\w-]+))"


class Registry:
    """The registry of the tracking server.

    Every method raises InputError with one line where the server does not do as it is asked.
    """

    def __init__(self) -> None:
        with errors("cannot be opened"):
            self.client = mlflow_client.connect()

    def find(self, uri: str) -> "ModelVersion":
        """Find models:/NAME/3 or models:/NAME@champion."""
        found = re.fullmatch(URI, uri)
        if not found:
            raise InputError(f"{uri!r} names no version; give models:/NAME/3 or models:/NAME@champion")
        name, number, alias = found.groups()
        version = self.by_alias(name, alias) if alias else self._by_number(name, number)
        if version is None:
            raise InputError(f"the registry has no {uri}; it has {self._list(name)}")
        return version

    def by_alias(self, name: str, alias: str) -> "ModelVersion | None":
        """Find the version that an alias points to; None where it points to none."""
        return self._query(f"{name}@{alias}", lambda: self.client.get_model_version_by_alias(name, alias))

    def _by_number(self, name: str, number: str) -> "ModelVersion | None":
        return self._query(f"{name}/{number}", lambda: self.client.get_model_version(name, number))

    @staticmethod
    def _query(what: str, question: "Callable[[], ModelVersion]") -> "ModelVersion | None":
        from mlflow.exceptions import MlflowException

        with errors(f"does not say what {what} is"):
            try:
                return question()
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return None
                raise

    def versions(self, name: str) -> "list[ModelVersion]":
        """List the versions of a model, the newest first; none where there is no such model."""
        _check_name(name)
        with errors(f"does not list {name}"):
            found: list[ModelVersion] = []
            token = None
            while True:
                page = self.client.search_model_versions(f"name = '{name}'", page_token=token)
                found += page
                token = page.token
                if not token:
                    return sorted(found, key=lambda version: -int(version.version))

    def create(self, name: str, source: str, run_id: str | None, tags: Mapping[str, str], text: str) -> "ModelVersion":
        """Add a version; the server numbers it, and no two get the same number."""
        self.ensure(name)
        with errors(f"does not take a version of {name}"):
            return self.client.create_model_version(name, source, run_id, dict(tags), description=text)

    def ensure(self, name: str) -> None:
        """Make a model without versions, unless it is there; it belongs to whoever made it."""
        from mlflow.exceptions import MlflowException

        _check_name(name)
        with errors(f"does not take the name {name}"):
            try:
                self.client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise

    def remove(self, version: "ModelVersion") -> None:
        """Take a version back, unless somebody did."""
        with errors(f"does not take version {version.version} of {version.name} back"):
            if self._by_number(version.name, str(version.version)) is not None:
                self.client.delete_model_version(version.name, version.version)

    def download(self, version: "ModelVersion", folder: Path) -> Path:
        """Download a version's files below `folder`, as MLflow does for any user."""
        import mlflow

        with errors(f"does not give the files of {version.name}/{version.version}"):
            uri = f"models:/{version.name}/{version.version}"
            files = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder)))
            for compiled in files.rglob("__pycache__"):  # who opens a version that lies on this disk leaves it there
                shutil.rmtree(compiled)
            return files

    def tag(self, version: "ModelVersion", **tags: str) -> None:
        """Set tags espalier.KEY of a version."""
        with errors(f"does not tag {version.name}/{version.version}"):
            for key, value in tags.items():
                self.client.set_model_version_tag(version.name, version.version, f"espalier.{key}", value)

    def point(self, name: str, alias: str, number: str | None) -> None:
        """Let an alias point to a version, or to none."""
        with errors(f"does not move {name}@{alias}"):
            if number is None:
                self.client.delete_registered_model_alias(name, alias)
            else:
                self.client.set_registered_model_alias(name, alias, number)

    def _list(self, name: str) -> str:
        numbers = [str(version.version) for version in self.versions(name)]
        return f"{name} in versions {', '.join(reversed(numbers))}" if numbers else f"no model {name}"


def _check_name(name: str) -> None:
    """Refuse names that MLflow's addresses cannot hold."""
    if not re.fullmatch(r"[\w.-]+(?: [\w.-]+)*", name):
        raise InputError(f"{name!r} is no name of a model; use letters, digits, dots, dashes and underscores")
