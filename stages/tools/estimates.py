"""Times and estimates over seeds -> the texts of tables."""

from collections.abc import Sequence
from typing import Literal

from stages.protocol.costs import Cost
from stages.protocol.intervals import Estimate, estimate
from stages.report.table import ALIKE, setting_to_text, write_speed_up


def estimate_time(costs: Sequence[Cost], name: Literal["median_ms", "speed_up"]) -> Estimate | None:
    """Estimate a time over seeds; None unless all were timed, and in one setting on one kind of device."""
    found = [value for cost in costs if (value := getattr(cost, name)) is not None]
    is_alike = len({setting_to_text(cost) for cost in costs}) == 1
    return estimate(found) if is_alike and len(found) == len(costs) else None


def write_estimate(estimate: Estimate, digits: int, factor: float = 1, sign: str = "") -> str:
    """Write a mean over seeds and the half-width of its interval."""
    text = f"{estimate.mean * factor:{sign}.{digits}f}"
    return text if estimate.half_width is None else f"{text} ± {estimate.half_width * factor:.{digits}f}"


def write_difference(difference: Estimate | None, digits: int) -> str:
    """Write a difference with its interval, and a mark if the interval contains zero."""
    if difference is None:
        return "–"
    marks = {None: " (one seed)", False: f" {ALIKE}", True: ""}
    return f"{write_estimate(difference, digits, sign='+')}{marks[difference.is_distinct]}"


def write_speed_up_over_seeds(costs: Sequence[Cost]) -> str:
    """Write the mean speed-up over the dense model, or of a single seed the interval of its passes."""
    if len(costs) == 1:
        return write_speed_up(costs[0])
    found = estimate_time(costs, "speed_up")
    return f"{write_estimate(found, 2)}×" if found else "–"
