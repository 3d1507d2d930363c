"""A comparison of finished cells -> the folder with its page, its table as Markdown, CSV and JSON, and its plots."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from stages.protocol.verdict import Verdict
from stages.report.figures import THEMES, draw_figure
from stages.report.table_page import write_table_page
from stages.storage.files import write_json, writing
from stages.storage.provenance import write_run_record

PAGE = "index.html"


@dataclass(frozen=True)
class Lead:
    """What a page begins with."""

    title: str
    verdict: Verdict
    captions: Mapping[str, str]
    """Name of a plot -> what it shows."""


def write_table_files(
    out: Path,
    name: str,
    lead: Lead,
    markdown: str,
    cells: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    plots: Mapping[str, Callable[[Axes], None]],
) -> None:
    """Write a comparison as files; all of `out` is replaced at the end, or nothing.

    Args:
        out: Output folder.
        name: Name of the JSON file, without .json.
        lead: What index.html begins with.
        markdown: Content of table.md.
        cells: The unrounded numbers, one row of table.csv per cell; a column may be missing in some rows.
        summary: Content of the JSON file.
        plots: Name of a plot -> the function that draws it; each is written as SVG and PNG.

    Raises:
        InputError: `out` cannot be written.
    """
    with writing(out) as folder:
        (folder / "table.md").write_text(markdown)
        # Of type object, integers stay integers in a column with gaps.
        pd.DataFrame(cells, dtype=object).to_csv(folder / "table.csv", index=False, lineterminator="\n")
        write_json(folder / f"{name}.json", summary)
        figures = {plot: {theme: draw_figure(draw, theme) for theme in THEMES} for plot, draw in plots.items()}
        for plot, draw in plots.items():
            (folder / f"{plot}.svg").write_bytes(figures[plot]["light"])
            (folder / f"{plot}.png").write_bytes(draw_figure(draw, "light", "png"))
        files = sorted(path.name for path in folder.iterdir())
        captions = {plot: lead.captions[plot] for plot in plots}
        page = write_table_page(lead.title, lead.verdict, markdown, figures, captions, files)
        (folder / PAGE).write_text(page)
        write_run_record(folder, "tools")
