"""The tables of compare.md are those of the measurements in docs/tables."""

import pytest

from docs.tables import PAGE, TABLES, read_curves, replace_tables


def test_the_page_has_the_tables_of_the_measurements():
    """`make tables` would change nothing."""
    assert "".join(replace_tables(PAGE.read_text())) == PAGE.read_text()


def test_a_page_without_the_marks_of_a_file_is_refused():
    """Its table would be missing otherwise."""
    with pytest.raises(ValueError, match=r"lacks a mark of curve-\w+\.csv"):
        list(replace_tables(PAGE.read_text().replace("<!-- end of curve-", "<!-- end of ")))


@pytest.mark.parametrize("path", sorted(TABLES.glob("*.csv")), ids=lambda path: path.stem)
def test_every_recipe_was_measured_with_the_same_seeds(path):
    """A missing training would move the mean of its row alone."""
    curves = read_curves(path)
    assert len({tuple(by_seed) for curve in curves.rows.values() for by_seed in curve.points.values()}) == 1


def test_a_step_that_a_seed_lacks_is_left_out(tmp_path):
    """Its mean would be over other seeds than those of the rest."""
    path = tmp_path / "curve.csv"
    path.write_text("recipe,seed,step,fid\na,0,10,1.5\na,1,10,2.5\na,0,20,1.0\n")
    assert read_curves(path).rows["a"].points == {10: {0: {"fid": 1.5}, 1: {"fid": 2.5}}}
