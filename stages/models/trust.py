"""params.yaml -> whether the Python file of a model may be run."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from stages.runtime.errors import InputError
from stages.runtime.schema import Section, read_yaml

_is_trusted: ContextVar[bool] = ContextVar("is_trusted", default=False)
WAY = "docs/how-to/own-class.md"


class _Source(Section, extra="ignore"):
    trust: bool = False


class _Fetch(Section, extra="ignore"):
    model: _Source = _Source()


class _Trust(Section, extra="ignore"):
    fetch: _Fetch = _Fetch()


@contextmanager
def trusting(*, is_trusted: bool) -> Iterator[None]:
    """Allow, or forbid again, that files of models are run inside of the block."""
    token = _is_trusted.set(is_trusted)
    try:
        yield
    finally:
        _is_trusted.reset(token)


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
    if not _is_trusted.get():
        found = f"{path} (sha256 {hashlib.sha256(content).hexdigest()[:12]}) is code, which runs as you"
        raise InputError(f"{found}; read it, then set fetch.model.trust: true in params.yaml ({WAY})")
