"""The measurements in docs/tables -> the tables and plots of compare.md.

A file has one row for each recipe, seed and step. `curve-NAME.csv` compares recoveries, also when one reaches another;
other files compare importances at equal steps, and each row of `ablation-NAME.csv` is a number of timesteps.
"""

import csv
from functools import partial
from pathlib import Path

import click
from matplotlib.axes import Axes

from stages.protocol.intervals import estimate
from stages.report.figures import draw_figure
from stages.report.markdown import markdown_table, rows_to_markdown
from stages.runtime.errors import InputError
from stages.tools.comparison.curve_figure import draw_curves
from stages.tools.comparison.curve_table import metric_rows, reach_rows
from stages.tools.comparison.curves import SHOWN, Curve, Curves, difference
from stages.tools.comparison.estimates import write_difference, write_estimate
from stages.tools.comparison.method_table import draw_ablation

DOCS = Path(__file__).parent
PAGE, TABLES = DOCS / "compare.md", DOCS / "tables"
CURVE, ABLATION = "curve-", "ablation-"


def read_curves(path: Path) -> Curves:
    """Read a file; its first recipe is the baseline.

    A step that was not measured with every seed of its recipe is left out.
    """
    points: dict[str, dict[int, dict[int, dict[str, float]]]] = {}
    try:
        with path.open() as file:
            for row in csv.DictReader(file):
                recipe, seed, step = row.pop("recipe"), int(row.pop("seed")), int(row.pop("step"))
                points.setdefault(recipe, {}).setdefault(step, {})[seed] = {key: float(row[key]) for key in row}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path.name} is damaged ({error}); every row needs recipe, seed, step and numbers") from None
    return Curves((), {recipe: Curve(recipe, _of_every_seed(found)) for recipe, found in points.items()}, (), 0)


def _of_every_seed(points: dict[int, dict[int, dict[str, float]]]) -> dict[int, dict[int, dict[str, float]]]:
    """Keep the steps that were measured with every seed: step -> seed -> numbers."""
    seeds = {seed for by_seed in points.values() for seed in by_seed}
    return {step: by_seed for step, by_seed in points.items() if by_seed.keys() == seeds}


def curves_to_markdown(curves: Curves) -> str:
    """Write a table of the metrics by steps, and one of when a recipe reaches the end of the baseline."""
    header = ["recipe", "", *(f"{step:,} steps" for step in curves.steps)]
    by_steps = [[row[0], title, *row[1:]] for title, rows in metric_rows(curves) for row in rows]
    reached = [{key: row[key] for key in row if "seconds" not in key} for row in reach_rows(curves)]
    return f"{markdown_table(header, by_steps, text_columns=2)}\n\n{rows_to_markdown(reached, text_columns=2)}"


def differences_to_markdown(curves: Curves) -> str:
    """Write a table of every row at each step, with its differences from the first row, paired by seed."""
    rows = [
        {
            "importance": curve.title,
            **({"steps": f"{step:,}"} if len(curves.steps) > 1 else {}),
            **_with_differences(curves, curve, step),
        }
        for step in curves.steps
        for curve in curves.rows.values()
        if step in curve.points
    ]
    return rows_to_markdown(rows)


def _with_differences(curves: Curves, curve: Curve, step: int) -> dict[str, str]:
    """Write each metric of a row at a step, and beside it the difference: column -> text."""
    texts = {}
    for name in curves.metrics:
        shown, is_first = SHOWN[name], curve is curves.baseline
        apart = None if is_first else difference(curve, curves.baseline, name, step)
        values = estimate(list(curve.values(step, name).values()))
        texts[shown.title] = write_estimate(values, shown.digits, shown.factor)
        texts[f"{shown.title} difference"] = write_difference(apart, shown.digits, shown.factor)
    return texts


def to_markdown(path: Path) -> str:
    """Write the tables of a file."""
    curves = read_curves(path)
    return curves_to_markdown(curves) if path.name.startswith(CURVE) else differences_to_markdown(curves)


def draw_plot(axis: Axes, path: Path) -> None:
    """Draw the plot of a file of recoveries or of numbers of timesteps.

    Raises:
        InputError: A row of an ablation is no number of timesteps, or it has several steps or no SSIM.
    """
    curves = read_curves(path)
    if path.name.startswith(CURVE):
        draw_curves(axis, curves)
        return
    try:
        (step,) = curves.steps
        values = {int(title.split()[0]): curve.values(step, "ssim") for title, curve in curves.rows.items()}
    except (KeyError, ValueError):
        found = f"{path.name} is no ablation"
        raise InputError(f"{found}; it needs rows such as 50 timesteps, all at one step, with ssim") from None
    draw_ablation(axis, {count: estimate([*values[count].values()]) for count in sorted(values)})


def replace_tables(page: str) -> str:
    """Write the tables anew between the marks of each file."""
    for path in sorted(TABLES.glob("*.csv")):
        before, begin, rest = page.partition(f"<!-- {path.name}: written by `make tables` -->\n")
        _, end, after = rest.partition(f"<!-- end of {path.name} -->")
        if not (begin and end):
            raise InputError(f"{PAGE.name} lacks the first or the last mark of {path.name}; add both")
        page = f"{before}{begin}\n{to_markdown(path)}\n\n{end}{after}"
    return page


@click.command()
def main() -> None:
    """Replace the tables of compare.md and draw their plots."""
    page, paths = replace_tables(PAGE.read_text()), [*TABLES.glob(f"{CURVE}*.csv"), *TABLES.glob(f"{ABLATION}*.csv")]
    plots = {path.stem: draw_figure(partial(draw_plot, path=path), "light", "png") for path in paths}
    PAGE.write_text(page)
    for name, plot in plots.items():
        (DOCS / f"{name}.png").write_bytes(plot)


if __name__ == "__main__":
    main()
