"""A story -> the grids of all models side by side with the results table below them, for the README and the cards."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from stages.report.story import Story
from stages.report.table import HEADER, to_rows


def write_summary(story: Story, reports: Path, target: Path) -> None:
    """Draw it as PNG."""
    names = list(story.evaluation["models"])
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
        cells = axis.table(to_rows(story.evaluation), colLabels=HEADER, loc="center", cellLoc="center")
        cells.auto_set_font_size(value=False)
        cells.set_fontsize(10)
        cells.auto_set_column_width(range(len(HEADER)))
        cells.scale(1, 1.6)
        figure.savefig(target, metadata={"Software": None})
