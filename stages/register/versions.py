"""The URI of a version -> its files in a temporary folder, after checking the hash of every file."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.protocol.evaluation import read_evaluation
from stages.protocol.protocol import Protocol
from stages.register.package import check_files
from stages.register.registry import CONTENT, EVIDENCE, MODEL, Registry, uri_of


@contextmanager
def downloaded(uri: str) -> Iterator[tuple[str, Path]]:
    """Yield models:/NAME/NUMBER and the folder of the files of models:/NAME/3 or models:/NAME@champion.

    Raises:
        InputError: The version does not exist, or a file is not as it was registered.
        UnavailableError: The server does not answer.
    """
    registry = Registry()
    version = registry.find(uri)
    with tempfile.TemporaryDirectory() as folder:
        files = registry.download(version, Path(folder))
        check_files(files, version.tags.get(CONTENT))
        yield uri_of(version), files


def model_folder(files: Path) -> Path:
    """Return the folder of the diffusers pipeline of a version."""
    return files / MODEL


def measured_under(files: Path) -> Protocol:
    """Return the protocol under which a version was measured."""
    return read_evaluation(files / EVIDENCE / "evaluation").protocol
