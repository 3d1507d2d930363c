"""Times and values per seed -> estimates over seeds and of differences; those -> the texts of tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from stages.protocol.costs import Cost
from stages.protocol.intervals import Estimate, estimate, paired_difference
from stages.report.table import ALIKE, conditions_to_text, setting_to_text, write_speed_up
from stages.tools.comparison.cells import FinishedCell

ONE_SEED = "One seed, so no intervals: the numbers do not show how much another seed would change."


def difference_by_seed(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Estimate the mean of ours − theirs, paired by seed; None without a common seed."""
    seeds = [seed for seed in ours if seed in theirs]
    return paired_difference([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]) if seeds else None


def estimate_time(costs: Sequence[Cost], name: Literal["median_ms", "speed_up"]) -> Estimate | None:
    """Estimate a time over seeds; None unless all were timed, and in one setting on one kind of device."""
    found = [value for cost in costs if (value := getattr(cost, name)) is not None]
    is_alike = len({setting_to_text(cost) for cost in costs}) == 1
    return estimate(found) if is_alike and len(found) == len(costs) else None


def write_estimate(estimate: Estimate, digits: int, factor: float = 1, sign: str = "") -> str:
    """Write a mean over seeds and the half-width of its interval."""
    text = f"{estimate.mean * factor:{sign}.{digits}f}"
    return text if estimate.half_width is None else f"{text} ± {estimate.half_width * factor:.{digits}f}"


def write_difference(difference: Estimate | None, digits: int, factor: float = 1, alone: str = "one seed") -> str:
    """Write a difference with its interval and a mark if that contains zero; `alone` says why there is no interval."""
    if difference is None:
        return "–"
    marks = {None: f" ({alone})", False: f" {ALIKE}", True: ""}
    return f"{write_estimate(difference, digits, factor, '+')}{marks[difference.is_distinct]}"


def protocols_to_text(cells: Iterable[FinishedCell]) -> str:
    """Name the protocols of some cells, one for each seed, and describe what they have in common."""
    protocols = {cell.seed: cell.record.protocol for cell in sorted(cells, key=lambda cell: cell.seed)}
    conditions = conditions_to_text(next(iter(protocols.values())), f"seeds {', '.join(map(str, protocols))}")
    names = ", ".join(protocol.id for protocol in protocols.values())
    return f"Protocols, which differ only in the seed ({names}): {conditions}"


def write_speed_up_over_seeds(costs: Sequence[Cost]) -> str:
    """Write the mean speed-up over the dense model, or of a single seed the interval of its passes."""
    if len(costs) == 1:
        return write_speed_up(costs[0])
    found = estimate_time(costs, "speed_up")
    return f"{write_estimate(found, 2)}×" if found else "–"
