"""A comparison of finished cells -> the folder with its table as Markdown, CSV and JSON, and its plots."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from stages.report.figures import draw_figure
from stages.storage.files import write_json, writing
from stages.storage.provenance import write_run_record


def write_table_files(
    out: Path,
    name: str,
    markdown: str,
    cells: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    plots: Mapping[str, Callable[[Axes], None]],
) -> None:
    """Write a comparison as files; all of `out` is replaced at the end, or nothing.

    Args:
        out: Output folder.
        name: Name of the JSON file, without .json.
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
        for plot, draw in plots.items():
            for kind in ("svg", "png"):
                (folder / f"{plot}.{kind}").write_bytes(draw_figure(draw, "light", kind))
        write_run_record(folder, "tools")
