"""One value per set -> mean and 95 % confidence interval, also of a difference."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student


@dataclass(frozen=True)
class Estimate:
    """A mean over sets with its confidence interval."""

    mean: float
    half_width: float | None
    """Half the width of the 95 % confidence interval; None for a single set."""

    @property
    def is_distinct(self) -> bool | None:
        """Whether zero lies outside the interval; None for a single set."""
        return None if self.half_width is None else abs(self.mean) > self.half_width


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate the mean with its 95 % interval by Student's t distribution; sets are independent samples."""
    count = len(values)
    if count == 1:
        return Estimate(values[0], None)
    return Estimate(fmean(values), float(student.ppf(0.975, count - 1)) * stdev(values) / count**0.5)


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Estimate:
    """Estimate the mean of values − others, paired by set: sets from the same noise vary together."""
    return estimate([value - other for value, other in zip(values, others, strict=True)])
