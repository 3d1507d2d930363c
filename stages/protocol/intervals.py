"""One value a set -> what can be said about their mean, and about a difference."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student


@dataclass(frozen=True)
class Estimate:
    """A mean over sets."""

    mean: float
    half_width: float | None
    """Of the 95 % interval; None for a single set, which has none."""

    @property
    def is_distinct(self) -> bool | None:
        """Whether zero lies outside the interval; None where there is none."""
        return None if self.half_width is None else abs(self.mean) > self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """Take the mean and its 95 % interval by Student's t; sets are independent draws."""
    count = len(values)
    if count == 1:
        return Estimate(values[0], None)
    return Estimate(fmean(values), float(student.ppf(0.975, count - 1)) * stdev(values) / count**0.5)


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """Estimate how much `values` are above `others`, set by set: the same noise makes them vary together."""
    return estimate([value - other for value, other in zip(values, others, strict=True)])
