"""A class, or a file of classes -> the label of each seed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.data.images import Table
from stages.runtime.bounded import check_regular
from stages.runtime.errors import InputError


@dataclass(frozen=True)
class Labels:
    """Where the classes of a job's images come from; without any, a class is the seed modulo their number."""

    first_seed: int = 0
    one: int | None = None
    """The class of all images."""
    each: Sequence[int] = ()
    """The class of each image, in the order of the seeds."""
    origin: str = ""
    """Option or file, for messages."""

    @property
    def description(self) -> str | None:
        """What the job says about them."""
        if self.one is not None:
            return f"class {self.one}"
        content = "\n".join(map(str, self.each)).encode()
        return f"file {hashlib.sha256(content).hexdigest()}" if self.each else None

    def check(self, table: Table | None) -> None:
        """Check that a model has these classes.

        Raises:
            InputError: It is unconditional, or lacks one.
        """
        if self.one is None and not self.each:
            return
        if table is None:
            raise InputError(f"{self.origin}: the model is unconditional; leave {self.origin.split()[0]} out")
        num_classes = len(table) - 1
        given = self.each or [self.one or 0]
        wrong = next((place for place, label in enumerate(given) if label >= num_classes), None)
        if wrong is not None:
            where = f"{self.origin}, line {wrong + 1}: class {given[wrong]}" if self.each else self.origin
            raise InputError(f"{where}: the model has {num_classes} classes; give 0 to {num_classes - 1}")

    def of(self, table: Table | None, seeds: range) -> list[int]:
        """Return the class of each seed; those that complete a batch get any. Empty for an unconditional model."""
        if table is None:
            return []
        num_classes = len(table) - 1
        if self.one is not None:
            return [self.one] * len(seeds)
        places = range(len(self.each))
        return [
            self.each[seed - self.first_seed] if seed - self.first_seed in places else seed % num_classes
            for seed in seeds
        ]


def read_labels(path: Path, first_seed: int, num_images: int) -> Labels:
    """Read a file with one class in each line, in the order of the seeds.

    Raises:
        InputError: The file cannot be read, a line is no class, or there are more or fewer lines than images.
    """
    origin = f"--labels {path}"
    check_regular(path)
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InputError(f"{origin}: {error.strerror}; correct the path to it") from None
    except UnicodeDecodeError:
        raise InputError(f"{origin} is not text; write one class in each line, such as 7") from None
    if len(lines) != num_images:
        raise InputError(f"{origin} has {len(lines)} lines, and {num_images} images are to be drawn; give as many")
    wrong = next((place for place, line in enumerate(lines) if not _is_class(line)), None)
    if wrong is not None:
        raise InputError(f"{origin}, line {wrong + 1}: {lines[wrong]!r} is no class; write a number from 0, such as 7")
    return Labels(first_seed, each=[int(line) for line in lines], origin=origin)


def _is_class(line: str) -> bool:
    return line.strip().isascii() and line.strip().isdigit() and len(line.strip()) < 10  # noqa: PLR2004
