"""A comparison -> metrics.json, results.md, a grid a model and the summary."""

from pathlib import Path

from stages.artifacts import write_atomically, write_json
from stages.evaluate.compare import Comparison
from stages.evaluate.pictures import write_grid, write_summary
from stages.evaluate.table import metrics_to_markdown


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write all that people and other programs want to see of a comparison."""
    write_json(folder / "metrics.json", comparison.metrics)
    write_atomically(folder / "results.md", metrics_to_markdown(comparison.metrics).encode())
    for name, pixels in comparison.drawn.items():
        write_grid(pixels, folder / f"{name}.png")
    write_summary(comparison.metrics, comparison.drawn, folder / "summary.png")
