"""Confidence intervals over a few sets."""

import numpy as np
import pytest
from scipy import stats

from stages.protocol.intervals import estimate, paired_difference

VALUES = [1.0, 1.4, 0.8, 1.1, 1.3]


def test_an_interval_is_that_of_students_t():
    """It equals scipy's interval."""
    low, high = stats.t.interval(0.95, 4, loc=np.mean(VALUES), scale=stats.sem(VALUES))
    found = estimate(VALUES)

    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))


def test_one_set_has_no_interval():
    """Half width and significance are None."""
    assert estimate([2.0]).half_width is None
    assert estimate([2.0]).is_distinct is None


def test_pairing_finds_a_small_difference():
    """A small difference is distinct between pairs that vary together, and not between shuffled sets."""
    above = [value + 0.05 for value in VALUES]
    shuffled = [above[index] for index in (3, 0, 4, 1, 2)]

    assert paired_difference(above, VALUES).is_distinct is True
    assert paired_difference(shuffled, VALUES).is_distinct is False
    assert paired_difference(VALUES, VALUES).is_distinct is False
