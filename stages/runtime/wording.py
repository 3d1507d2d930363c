"""Numbers, durations, sizes and rows -> words and tables for people."""

from collections.abc import Sequence

KIBI = 1024
SECONDS_PER_MINUTE, MINUTES_PER_HOUR = 60, 60
THREE_DIGITS = 999.5
"""From here on a number rounds to four digits."""


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Write a number with its noun: 1 row, 2 rows."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def first_names(names: Sequence[str], most: int) -> str:
    """Name the first ones, and say how many more there are: a, b and 3 more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def format_duration(seconds: float) -> str:
    """Format seconds as 45 s, 3 min 20 s or 2 h 5 min."""
    minutes, rest = divmod(round(seconds), SECONDS_PER_MINUTE)
    if not minutes:
        return f"{rest} s"
    if minutes < MINUTES_PER_HOUR:
        return f"{minutes} min {rest} s"
    return f"{minutes // MINUTES_PER_HOUR} h {minutes % MINUTES_PER_HOUR} min"


def format_bytes(size_bytes: float) -> str:
    """Format bytes in the largest binary unit that they fill: 3.4 GiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    value = size_bytes
    while value >= KIBI and len(units) > 1:
        value, units = value / KIBI, units[1:]
    return f"{value:.0f} {units[0]}" if value >= THREE_DIGITS else f"{value:.3g} {units[0]}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns with two blanks between them; the text of the last columns may be empty."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
