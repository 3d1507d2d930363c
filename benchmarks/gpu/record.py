"""Rows of a part -> its table in Markdown and its record in JSON."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, Rows
from stages.runtime.device import cpu_name
from stages.runtime.errors import shown
from stages.storage.files import write_atomically, write_json

HIDDEN = {"passes", "p95_ms", "speed_up_low", "speed_up_high"}
"""What only the JSON shows."""


def about(bench: Bench) -> dict[str, Any]:
    """Describe device, versions, precisions and time, for the record of a part."""
    is_gpu = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_gpu else f"{cpu_name()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "precisions": list(bench.precisions),
        "tiny": bench.tiny,
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def markdown(rows: Rows) -> str:
    """Format rows as a Markdown table; columns that hold nothing are left out."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if value not in (None, ""))
    columns = [name for name in names if name not in HIDDEN]
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    lines += [f"| {' | '.join(_cell(row.get(name)) for name in columns)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.3g}"
    return shown(str(value or "–")).replace("|", "/")


def write_part(name: str, rows: Rows, bench: Bench, out: Path) -> None:
    """Write the table and the record of a part.

    Raises:
        InputError: The folder cannot be written.
    """
    facts = about(bench)
    kinds = sorted({row["deterministic"] for row in rows if "deterministic" in row})
    write_json(out / f"{name}.json", {**facts, "deterministic": kinds, "part": name, "rows": rows})
    title = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "precisions")
    write_atomically(out / f"{name}.md", f"{title}\n\n{markdown(rows)}\n".encode())
