"""The measurements in docs/tables, one row for each recipe, seed and step -> the tables and plots of compare.md."""

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from stages.report.figures import draw_figure
from stages.report.markdown import markdown_table, rows_to_markdown
from stages.tools.curve_figure import draw_curves
from stages.tools.curve_table import metric_rows, reach_rows
from stages.tools.curves import Curve, Curves

DOCS = Path(__file__).parent
PAGE, TABLES = DOCS / "compare.md", DOCS / "tables"


def read_curves(path: Path) -> Curves:
    """Read what `compare --curve` writes into table.csv; the first recipe is the baseline.

    A step that was not measured with every seed of its recipe is left out.
    """
    points: dict[str, dict[int, dict[int, dict[str, float]]]] = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            recipe, seed, step = row.pop("recipe"), int(row.pop("seed")), int(row.pop("step"))
            points.setdefault(recipe, {}).setdefault(step, {})[seed] = {key: float(row[key]) for key in row}
    whole = {
        recipe: {step: it for step, it in found.items() if len(it) == len(found[min(found)])}
        for recipe, found in points.items()
    }
    return Curves((), {recipe: Curve(recipe, found) for recipe, found in whole.items()}, (), 0)


def curves_to_markdown(curves: Curves) -> str:
    """Write a table of the metrics by steps, and one of when a recipe reaches the end of the baseline."""
    header = ["recipe", "", *(f"{step:,} steps" for step in curves.steps)]
    by_steps = [[row[0], title, *row[1:]] for title, rows in metric_rows(curves) for row in rows]
    reached = [{key: row[key] for key in row if "seconds" not in key} for row in reach_rows(curves)]
    return f"{markdown_table(header, by_steps, text_columns=2)}\n\n{rows_to_markdown(reached, text_columns=2)}"


def replace_tables(page: str) -> Iterator[str]:
    """Write the tables anew between the marks of each file; yields the page in parts."""
    for path in sorted(TABLES.glob("*.csv")):
        before, begin, rest = page.partition(f"<!-- {path.name}: written by `make tables` -->\n")
        _, end, page = rest.partition(f"<!-- end of {path.name} -->")
        if not (begin and end):
            raise ValueError(f"{PAGE.name} lacks a mark of {path.name}")
        yield f"{before}{begin}\n{curves_to_markdown(read_curves(path))}\n\n{end}"
    yield page


def main() -> None:
    """Replace the tables of compare.md and draw their plots."""
    PAGE.write_text("".join(replace_tables(PAGE.read_text())))
    for path in TABLES.glob("*.csv"):
        plot = draw_figure(partial(draw_curves, curves=read_curves(path)), "light", "png")
        (DOCS / f"{path.stem}.png").write_bytes(plot)


if __name__ == "__main__":
    main()
