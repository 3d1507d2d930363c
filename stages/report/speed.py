"""The truth table of speed -> the rows of each setting together."""

from collections.abc import Iterator

from stages.protocol.costs import Cost, CostsRecord

TWIN = "finetuned"
"""It has the widths of pruned, and so its rows: shown once."""


def compare_costs(record: CostsRecord) -> Iterator[Cost]:
    """Give every setting's rows one after the other."""
    rows = [row for row in record.costs if row.model != TWIN]
    for setting in dict.fromkeys(_setting(row) for row in rows):
        yield from (row for row in rows if _setting(row) == setting)


def _setting(row: Cost) -> tuple[str, str, int]:
    return row.precision, row.mode, row.batch
