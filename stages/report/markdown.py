"""A header and rows of text -> a Markdown table."""

from collections.abc import Iterable, Mapping, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Iterable[str]], text_columns: int = 1) -> str:
    """Write a Markdown table, without a newline at its end.

    Args:
        header: Column names.
        rows: One text per column.
        text_columns: How many columns from the left are aligned left; the others hold numbers and are aligned right.
    """
    rules = ["---" if index < text_columns else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rules, *rows))


def rows_to_markdown(rows: Sequence[Mapping[str, str]], text_columns: int = 1) -> str:
    """Write rows, column -> text, as a Markdown table whose header is the first one's columns."""
    return markdown_table(list(rows[0]), [row.values() for row in rows], text_columns)
