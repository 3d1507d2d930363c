"""The tables of compare.md are those of the measurements in docs/tables, and those of the presets their forecast's."""

import re

import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure

from benchmarks.forecast import main as forecast
from docs.tables import PAGE, TABLES, draw_plot, read_curves, replace_tables, to_markdown
from stages.runtime.errors import InputError
from tests.markdown import ROOT, blocks


def test_the_page_has_the_tables_of_the_measurements():
    """`make tables` would change nothing."""
    assert replace_tables(PAGE.read_text()) == PAGE.read_text()


def test_a_page_without_the_marks_of_a_file_is_refused():
    """Its table would be missing otherwise."""
    with pytest.raises(InputError, match=r"lacks the first or the last mark of curve-[\w-]+\.csv"):
        replace_tables(PAGE.read_text().replace("<!-- end of curve-", "<!-- end of "))


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.csv")), ids=lambda path: path.stem)
def test_every_recipe_was_measured_with_the_same_seeds(path):
    """A missing training would move the mean of its row alone."""
    curves = read_curves(path)
    assert len({tuple(by_seed) for curve in curves.rows.values() for by_seed in curve.points.values()}) == 1


@pytest.mark.parametrize("step", [5, 20])
def test_a_step_that_a_seed_lacks_is_left_out(tmp_path, step):
    """Its mean would be over other seeds than those of the rest."""
    path = tmp_path / "curve.csv"
    path.write_text(f"recipe,seed,step,fid\na,0,10,1.5\na,1,10,2.5\na,0,{step},1.0\n")
    assert read_curves(path).rows["a"].points == {10: {0: {"fid": 1.5}, 1: {"fid": 2.5}}}


def test_importances_are_compared_at_equal_steps(tmp_path):
    """Each beside the first one, paired by seed: differences of .5 and .7, so .6 ± 12.706 · .1414 / √2."""
    path = tmp_path / "criteria.csv"
    path.write_text("recipe,seed,step,fid\ntaylor,0,5,1.0\ntaylor,1,5,2.0\nrandom,0,5,1.5\nrandom,1,5,2.7\n")
    *_, taylor, random = to_markdown(path).splitlines()
    assert taylor == "| taylor | 1.500 ± 6.353 | – |"
    assert random == "| random | 2.100 ± 7.624 | +0.600 ± 1.271 ≈ |"


@pytest.mark.parametrize("rows", ["all,0,0,.9", "50 timesteps,0,0,.8\n50 timesteps,0,9,.9"])
def test_another_table_has_no_plot_of_timesteps(tmp_path, rows):
    """One line says what an ablation needs."""
    path = tmp_path / "ablation-x.csv"
    path.write_text(f"recipe,seed,step,ssim\n{rows}\n")
    with pytest.raises(InputError, match=r"^ablation-x\.csv is no ablation; it needs rows such as 50 timesteps"):
        draw_plot(Figure().subplots(), path)


def test_a_damaged_file_is_one_line(tmp_path):
    """Its table would be of other numbers than those that were measured."""
    path = tmp_path / "curve.csv"
    path.write_text("recipe,seed,step,fid\na,0,10,high\n")
    with pytest.raises(InputError, match=r"curve\.csv is damaged \(could not convert string to float: 'high'\)"):
        read_curves(path)


@pytest.mark.parametrize("gpus", [1, 8])
def test_the_hours_of_the_presets_are_those_of_the_forecast(gpus):
    """The tables of the presets' page, as its command prints them."""
    printed = CliRunner().invoke(forecast, ["--tflops", "40", "--gpus", str(gpus)])

    assert printed.exit_code == 0
    tables = re.findall(r"(?:^\|.*\n)+", (ROOT / "docs" / "presets" / "README.md").read_text(), re.MULTILINE)
    assert printed.output in tables


def test_pages_show_the_quality_of_the_default_run_as_the_readme_does():
    """`make results` replaces that of README.md alone; times differ from run to run, and are not compared."""
    _, results, _ = re.split("<!-- .*results.* -->", (ROOT / "README.md").read_text())
    (shown,) = [it.text for it in blocks("docs/how-to/read-the-page.md", "text") if it.text.startswith("Good.")]
    whole, part = (dict(_rows(text)) for text in (results, shown))
    (quoted,) = re.findall(r"finetuned digits have `fid_dense` (\S+ ± \.\d+)", (ROOT / "docs/metrics.md").read_text())

    assert shown.splitlines()[0].partition("; ")[2] in results
    assert part.keys() == whole.keys()
    for model, cells in part.items():
        assert cells - {"…"} <= whole[model]
    assert re.sub(r"(^| )\.", r"\g<1>0.", quoted) in whole["finetuned"]


def _rows(text):
    """Yield the models of a table, each with its cells."""
    for line in text.splitlines():
        model, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells and not set(model) & set("-:") and model != "model":
            yield model, set(cells)
