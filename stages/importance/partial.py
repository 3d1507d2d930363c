"""A measurement in progress <-> a safetensors file, from which the same command goes on to the same bits."""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import Field

from stages.runtime.bounded import parse_json
from stages.runtime.errors import InputError, warn
from stages.runtime.schema import Frozen
from stages.storage.tensors import read_metadata, read_tensors, write_tensors

SECONDS = 30.0
"""Time between two files; more where writing one takes more than a twentieth of it."""
METADATA_KEY = "position"


class Position(Frozen):
    """How far a measurement is."""

    losses: list[list[float]] = Field(default_factory=list)
    """Used losses of each finished batch."""
    used: list[float] = Field(default_factory=list)
    """Used losses of the batch in progress."""
    largest: float = 0.0
    """Its largest loss so far."""
    rounds: int = Field(0, ge=0)
    """Its rounds that are in the sum."""


class PartialSum:
    """The sum of a measurement, as it was when a file was last written.

    Args:
        path: The file, which no measurement of other params, inputs or code has; None keeps nothing.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.wait_s = path, SECONDS
        self.written = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether it is time to write the file again."""
        return self.path is not None and time.monotonic() - self.written >= self.wait_s

    def read(self) -> tuple[Position, dict[str, torch.Tensor]]:
        """Read how far an earlier process came, and its sum; the begin, and nothing, where there is none."""
        if self.path is None or not self.path.exists():
            return Position(), {}
        try:
            found = parse_json(read_metadata(self.path).get(METADATA_KEY, "").encode())
            return Position.model_validate(found), read_tensors(self.path)
        except (InputError, ValueError):
            warn(f"{self.path} is damaged; this measurement begins again")
            return Position(), {}

    def write(self, position: Position, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace the file whole."""
        if self.path is None:
            return
        begin = time.monotonic()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(self.path, tensors, {METADATA_KEY: position.model_dump_json()})
        self.written = time.monotonic()
        self.wait_s = max(SECONDS, 20 * (self.written - begin))

    def clear(self) -> None:
        """Remove the file, once the outputs are written."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
