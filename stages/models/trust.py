"""params.yaml -> whether the Python file of a model may be run."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from pydantic import Field

from stages.runtime.errors import InputError
from stages.runtime.schema import Section, read_yaml

_is_trusted: ContextVar[bool] = ContextVar("is_trusted", default=False)
_code_sha256: ContextVar[str | None] = ContextVar("code_sha256", default=None)
WAY = "docs/how-to/own-class.md"


class _Source(Section, extra="ignore"):
    trust: bool = Field(default=False, strict=True)


class _Fetch(Section, extra="ignore"):
    model: _Source = _Source()


class _Trust(Section, extra="ignore"):
    fetch: _Fetch = _Fetch()


@contextmanager
def trusting(*, is_trusted: bool, code_sha256: str | None = None) -> Iterator[None]:
    """Allow, or forbid again, that files of models are run inside of the block: all, or the one with this hash."""
    tokens = _is_trusted.set(is_trusted), _code_sha256.set(code_sha256)
    try:
        yield
    finally:
        _is_trusted.reset(tokens[0])
        _code_sha256.reset(tokens[1])


@contextmanager
def trusting_params(path: Path) -> Iterator[None]:
    """Allow it if `fetch.model.trust` of a params file is true.

    Raises:
        InputError: The file is missing or is not valid YAML, or the value is no switch.
    """
    with trusting(is_trusted=read_yaml(path, _Trust).fetch.model.trust):
        yield


def check_trust(path: Path, content: bytes) -> None:
    """Check that the file of a model may be run.

    Raises:
        InputError: It may not.
    """
    sha256, checked = hashlib.sha256(content).hexdigest(), _code_sha256.get()
    if not _is_trusted.get():
        found = f"{path} (sha256 {sha256[:12]}) is code, which runs as you"
        raise InputError(f"{found}; read it, then set fetch.model.trust: true in params.yaml ({WAY})")
    if checked not in (None, sha256):
        found = f"{path} has sha256 {sha256[:12]}, and had {checked[:12]} when the model was checked"
        raise InputError(f"{found}; let nobody change the folder while it is read, and start again")
