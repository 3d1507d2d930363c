"""The flow sweep: what its table is compared with."""

import pytest

from flows.sweep import find_baseline
from flows.workspaces.grid import PlannedCell

CELLS = {
    f"{criterion}-{seed}": PlannedCell("", {"seed": seed, "importance.criterion": criterion})
    for seed in (3, 4)
    for criterion in ("taylor", "random")
}
"""In the order of a grid whose first key is the seed."""


@pytest.mark.parametrize(
    ("failed", "expected"),
    [
        ((), "taylor-3"),
        (("taylor-3",), "taylor-4"),
        (("taylor-3", "random-3"), "taylor-4"),
        (("taylor-3", "taylor-4"), ""),
    ],
)
def test_the_first_values_of_the_grid_are_the_baseline(failed, expected):
    """By the first cell of theirs that finished, of whatever seed; without one nothing is compared."""
    assert find_baseline(CELLS, failed) == expected
