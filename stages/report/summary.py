"""Report data -> the results table and the pictures for README, cards and DVC."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from stages.report.report_data import ReportData
from stages.report.table import HEADER, to_markdown, to_rows
from stages.report.variants import variants_to_markdown
from stages.storage.files import write_atomically, write_json

PICTURE, VERDICT = "summary.png", "verdict.json"


def write_summary(report: ReportData, figures: Mapping[str, Mapping[str, bytes]], reports: Path, folder: Path) -> None:
    """Write results.md, which begins with the verdict, verdict.json, the figures for a light page, and summary.png.

    With variants there is variants.md, too.
    """
    verdict = report.verdict()
    results = f"**{verdict.sentence}**\n\n{to_markdown(report.record, report.costs)}"
    write_atomically(folder / "results.md", results.encode())
    if report.variants:
        write_atomically(folder / "variants.md", variants_to_markdown(report.variants).encode())
    write_json(folder / VERDICT, verdict.model_dump(mode="json"))
    for name, themes in figures.items():
        write_atomically(folder / f"{name}.svg", themes["light"])
    draw_summary(report, reports).savefig(folder / PICTURE, metadata={"Software": None})


def draw_summary(report: ReportData, reports: Path) -> Figure:
    """Draw the image grids of all models side by side, and the results table below."""
    names = list(report.record.models)
    with mpl.rc_context({"font.size": 11, "figure.dpi": 110}):
        figure = Figure(figsize=(4 * len(names), 7.2), layout="constrained")
        pictures, table = figure.subfigures(2, 1, squeeze=False, height_ratios=[5, 1.1])[:, 0]
        for axis, name in zip(pictures.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            with Image.open(reports / "evaluate" / f"{name}.png") as image:
                axis.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=255)
            axis.set_title(name)
            axis.axis("off")
        axis = table.subplots()
        axis.axis("off")
        cells = axis.table(to_rows(report.record, report.costs), colLabels=HEADER, loc="center", cellLoc="center")
        cells.auto_set_font_size(value=False)
        cells.set_fontsize(10)
        cells.auto_set_column_width(range(len(HEADER)))
        cells.scale(1, 1.6)
    return figure
