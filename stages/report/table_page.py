"""Tables in Markdown, figures and a verdict -> one page that needs no other file and no network."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from stages.protocol.verdict import Level, Verdict
from stages.report.templates import WORDS, embed_figures, render

LEVELS: Sequence[Level] = ("good", "changed", "worse")
"""From the best to the worst."""


@dataclass(frozen=True)
class Block:
    """A part of a Markdown text."""

    kind: str
    """heading, table or text."""
    text: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def worst_level(verdicts: Sequence[Verdict]) -> Level:
    """Return the worst level of some verdicts."""
    return max((verdict.level for verdict in verdicts), key=LEVELS.index)


def markdown_blocks(text: str) -> Iterator[Block]:
    """Read the Markdown that the tables are written in: headings, tables and paragraphs, apart by empty lines."""
    for part in filter(None, map(str.strip, text.split("\n\n"))):
        if part.startswith("#"):
            yield Block("heading", part.lstrip("# "))
        elif part.startswith("|"):
            header, _, *rows = ([cell.strip() for cell in line[1:-1].split(" | ")] for line in part.splitlines())
            yield Block("table", header=header, rows=rows)
        else:
            yield Block("text", part.replace("`", ""))


def write_table_page(
    title: str,
    verdict: Verdict,
    markdown: str,
    figures: Mapping[str, Mapping[str, bytes]],
    captions: Mapping[str, str],
    files: Sequence[str],
) -> str:
    """Render the page of a comparison.

    Args:
        title: Heading of the page.
        verdict: What it begins with.
        markdown: The tables and their explanations.
        figures: Name -> theme -> SVG.
        captions: Name -> what the figure shows.
        files: Names of the files beside the page, which it links to.
    """
    blocks = [block for block in markdown_blocks(markdown) if block.text != title]
    return render(
        "table_page.html.j2",
        title=title,
        verdict=verdict,
        word=WORDS[verdict.level],
        blocks=blocks,
        figures=embed_figures(figures),
        captions=captions,
        files=files,
    )
