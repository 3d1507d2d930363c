"""What this process found, and how far it is -> JSON files for the program that started it."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

RESULT_VARIABLE = "ESPALIER_RESULT_FILE"
"""Environment variable: the file that takes what a command found, or the message of its error."""
PROGRESS_VARIABLE = "ESPALIER_PROGRESS_FILE"
"""Environment variable: the file that takes how far a command is."""


def write_result(**found: Any) -> None:  # noqa: ANN401  # whatever JSON takes
    """Replace the result file with `found`; does nothing where no file is named."""
    _write(RESULT_VARIABLE, found)


def write_progress(label: str, done: int, total: int, rate_per_s: float, left_s: float) -> None:
    """Replace the progress file: `done` of `total` items, items per second, seconds left."""
    _write(
        PROGRESS_VARIABLE,
        {"label": label, "done": done, "total": total, "rate_per_s": rate_per_s, "left_s": left_s},
    )


def _write(variable: str, content: dict[str, Any]) -> None:
    """Replace the file whole, so that a reader never finds half of it; a full disk does not hide the work's own end."""
    path = os.environ.get(variable)
    if not path:
        return
    temporary = Path(f"{path}.{os.getpid()}")
    with suppress(OSError):
        temporary.write_text(json.dumps(content))
        temporary.replace(path)
