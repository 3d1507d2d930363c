"""The costs of the models -> rows grouped by setting."""

from collections.abc import Iterator

from stages.protocol.costs import Cost, CostsRecord

TWIN = "finetuned"
"""Has the widths of pruned, so its rows are the same and are left out."""


def rows_by_setting(record: CostsRecord) -> Iterator[Cost]:
    """List the rows, those of one setting together."""
    rows = [row for row in record.costs if row.model != TWIN]
    for setting in dict.fromkeys(_setting(row) for row in rows):
        yield from (row for row in rows if _setting(row) == setting)


def _setting(row: Cost) -> tuple[str, str, int]:
    return row.precision, row.mode, row.batch
