"""The reports of a compression -> what its page shows of a grid, if one was drawn with the same weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.protocol.evaluation import EvaluationRecord
from stages.protocol.grid import read_grid
from stages.report.grid_figure import CAPTIONS, draw_grid_figures
from stages.report.grid_text import explain, summarise
from stages.runtime.errors import InputError, warn


@dataclass(frozen=True)
class GridSection:
    """The section on steps and guidance."""

    sentence: str
    reasons: Sequence[str]
    figures: Mapping[str, Mapping[str, bytes]]
    """Name -> theme -> SVG."""
    captions: Mapping[str, str]


def read_section(reports: Path, record: EvaluationRecord) -> GridSection | None:
    """Read the grid of these models; None where there is none, or it was drawn with other weights.

    One that cannot be read gives a warning, since no stage asked for it.
    """
    folder = reports / "grid"
    if not (folder / "grid.json").is_file():
        return None
    try:
        grid = read_grid(folder)
    except InputError as error:
        warn(f"the page leaves the grid out: {error.message}")
        return None
    hashes = {name: model.weights_sha256 for name, model in record.models.items()}
    if any(hashes.get(name) != sha256 for name, sha256 in grid.weights_sha256.items()):
        return None
    figures = {f"grid-{name}": themes for name, themes in draw_grid_figures(grid).items()}
    captions = {f"grid-{name}": text for name, text in CAPTIONS.items()}
    return GridSection(summarise(grid), explain(grid), figures, captions)
