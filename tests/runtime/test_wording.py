"""Numbers -> words: one thing is no plural, and sizes and durations are read at a glance."""

import pytest

from stages.runtime.wording import count, format_bytes, format_duration, format_table


@pytest.mark.parametrize(("number", "expected"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows")])
def test_one_thing_is_no_plural(number, expected):
    """Only one is singular."""
    assert count(number, "row") == expected
    assert count(1, "class", "classes") == "1 class"
    assert count(3, "class", "classes") == "3 classes"


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_a_duration_has_two_units_at_most(seconds, expected):
    """The smaller one is dropped where it no longer matters."""
    assert format_duration(seconds) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1000 * 2**20, "1000 MiB"),
        (3.4 * 2**30, "3.4 GiB"),
        (2**50, "1024 TiB"),
    ],
)
def test_a_size_has_its_largest_unit(size, expected):
    """Binary units, three digits."""
    assert format_bytes(size) == expected


def test_columns_of_a_table_are_aligned():
    """The widest cell decides."""
    assert format_table(["a", "b"], [["long", "1"], ["x", ""]]) == ["a     b", "long  1", "x"]
