"""The truth table of speed -> every row with its speed-up over dense in the same setting."""

from collections.abc import Iterator, Mapping
from typing import Any

from stages.report.story import DENSE


def compare_costs(evaluation: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every setting's rows together, with the speed-up over dense; finetuned has the rows of pruned."""
    rows = [row for row in evaluation["costs"] if row["model"] != "finetuned"]
    settings = dict.fromkeys(_setting(row) for row in rows)
    for setting in settings:
        alike = [row for row in rows if _setting(row) == setting]
        dense_ms = next(row["median_ms"] for row in alike if row["model"] == DENSE)
        for row in alike:
            ratio = evaluation["models"][row["model"]]["macs_ratio"]
            yield {**row, "macs_ratio": ratio, "speed_up": row["median_ms"] and dense_ms / row["median_ms"]}


def _setting(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["precision"], row["mode"], row["batch"]
