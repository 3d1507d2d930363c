"""The costs of the models -> rows grouped by setting."""

from collections.abc import Iterator

from stages.protocol.costs import Cost
from stages.protocol.verdict import FINETUNED
from stages.report.report_data import ReportData


def rows_by_setting(report: ReportData) -> Iterator[Cost]:
    """List the rows, those of one setting together; those of finetuned only if it has other widths than pruned."""
    rows = [row for row in report.costs.costs if row.model != FINETUNED or not report.has_equal_widths]
    for setting in dict.fromkeys(_setting(row) for row in rows):
        yield from (row for row in rows if _setting(row) == setting)


def timed_model(report: ReportData) -> str:
    """Name the model whose rows show the speed of what is shipped."""
    return "pruned" if report.has_equal_widths else FINETUNED


def _setting(row: Cost) -> tuple[str, str, int]:
    return row.precision, row.mode, row.batch
