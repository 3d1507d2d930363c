"""One value per seed -> the estimate of a difference; estimates over seeds -> the texts of tables."""

from collections.abc import Mapping

from stages.protocol.intervals import Estimate, paired_difference
from stages.report.table import ALIKE


def difference_by_seed(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """Estimate the mean of ours − theirs, paired by seed; None without a common seed."""
    seeds = [seed for seed in ours if seed in theirs]
    return paired_difference([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]) if seeds else None


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
