"""What recovery costs: curves over seeds, and when a recipe reaches what another has at its end."""

import csv
import json
from io import BytesIO
from math import sqrt

import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure
from PIL import Image

from stages.protocol.evaluation import Metric, read_evaluation
from stages.runtime.errors import InputError
from stages.storage.files import write_json
from stages.tools.__main__ import main
from stages.tools.comparison.cells import CELL, CellRecord
from stages.tools.comparison.curve_figure import draw_curves
from stages.tools.comparison.curve_table import to_json, to_markdown, write_curve_table
from stages.tools.comparison.curves import Curve, reach, read_curves, seconds_ratio
from tests.markdown import tables
from tests.records import make_evaluation, write_cell_files, write_variants
from tests.tools.test_method_table import T_OF_THREE
from tests.tools.test_sweep_table import DENSE_MACS, make_point

STEPS, ROWS = (10, 20, 40), ("noise", "output")
FIDS = {"noise": (3.0, 2.0, 1.0), "output": (2.0, 0.9, 0.5)}
SSIMS = {"noise": (0.5, 0.7, 0.9), "output": (0.8, 0.95, 0.96)}
SECONDS = {"noise": 1.0, "output": 1.5}
"""Seconds of a step."""


def make_curve(values, metric="fid"):
    """Make a curve of values: step -> the value of each seed; a step takes a second."""
    return Curve(
        "a",
        {
            step: {seed: {metric: value, "seconds": float(step)} for seed, value in enumerate(given)}
            for step, given in values.items()
        },
    )


def with_quality(model, fid, ssim):
    """Give a model these means of FID and SSIM."""
    changes = {name: Metric(sets=[it, it], mean=it, half_width=0.0) for name, it in (("fid", fid), ("ssim", ssim))}
    return model.model_copy(update=changes)


@pytest.fixture
def write_cell(protocol, tmp_path):
    """Write a finished cell of a recovery comparison, and return its folder."""

    def write(row, seed, *, title="", shift=0.0, steps=STEPS, alone=True, device="cpu", pruned="c" * 64, **changes):
        folder = tmp_path / "cells" / f"{title or row}-{seed}"
        drawn = protocol.model_copy(update={"seed": seed, **changes})
        dense, points = make_point(DENSE_MACS, 0.5), {}
        for step, fid, ssim in zip(STEPS, FIDS[row], SSIMS[row], strict=True):
            points[step] = with_quality(make_point(500_000, 1.0), fid + shift, ssim - shift / 10)
        models = {"dense": dense, "pruned": make_point(500_000, 9.0).model_copy(update={"weights_sha256": pruned})}
        record = make_evaluation(drawn, {**models, "finetuned": points[STEPS[-1]]})
        kept = {f"step-{step}": points[step] for step in steps[:-1]}
        write_json(folder / "snapshots.json", make_evaluation(drawn, {"dense": dense, **kept}).model_dump(mode="json"))
        seconds = {str(step): (SECONDS[row] + shift) * step for step in steps}
        cost = {"seconds_by_step": seconds, "alone": alone, "machine": f"{device}, 2 threads"}
        write_json(folder / "finetune.provenance.json", {"cost": cost, "device": {"name": "cpu x86_64"}})
        given = {"finetune.steps": steps[-1], "seed": seed}
        return write_cell_files(folder, record, overrides=given, mlflow_run="run", row=title or row)

    return write


@pytest.fixture
def cells(write_cell, tmp_path):
    """Two recipes with three seeds, of which each has a higher FID and longer steps than the one before."""
    for row in ROWS:
        for seed in range(3):
            write_cell(row, seed, shift=0.1 * seed)
    return tmp_path / "cells"


def test_criteria_begin_with_pruned_models_of_their_own(write_cell, tmp_path):
    """Rows of the methods are compared like recipes; recipes beside them still share one pruned model."""
    for row, title, pruned in zip((ROWS * 2)[:3], ("random", "taylor", "noise"), "abc", strict=True):
        write_cell(row, 0, title=title, pruned=pruned * 64)
    assert list(read_curves(tmp_path / "cells", ["random", "taylor", "noise"]).rows) == ["random", "taylor", "noise"]

    write_cell(ROWS[0], 0, title="output", pruned="d" * 64)
    with pytest.raises(InputError, match="noise-0 and output-0, both of seed 0, recovered two pruned models"):
        read_curves(tmp_path / "cells", ["random", "taylor", "noise", "output"])


def test_variants_of_the_last_step_have_a_table(write_cell, tmp_path):
    """Those of the dense model and of each recipe, paired by seed with the model that they are made of."""
    for row in ROWS:
        for seed in range(3):
            folder = write_cell(row, seed, shift=0.1 * seed)
            fid = FIDS[row][-1] + 0.1 * seed
            write_variants(folder, read_evaluation(folder), {"dense": 0.5, "finetuned": fid + 0.1 * (seed + 1)})
    write_curve_table(tmp_path / "cells", tmp_path / "out", ROWS, "digits", "")
    rows = {row["variant"]: row for row in tables((tmp_path / "out" / "table.md").read_text())[-1]}
    summary = json.loads((tmp_path / "out" / "curve_table.json").read_text())["variants"]

    assert list(rows) == ["pretrained + int8", "noise + int8", "output + int8"]
    assert (rows["output + int8"]["difference"], rows["output + int8"]["seeds"]) == ("+0.200 ± 0.248 ≈", "3")
    assert summary["noise + int8"]["fid"]["mean"] == pytest.approx(1.3)


def test_a_recipe_is_reached_from_where_it_is_nowhere_worse_beyond_the_interval():
    """Differences from the end of the other: +.5 ± .25; then +.1 ± .43, which is no difference; then −.5 ± .25."""
    other = make_curve({40: (1.0, 2.0, 3.0)})
    curve = make_curve({10: (1.5, 2.4, 3.6), 20: (0.9, 2.3, 3.1), 40: (0.5, 1.6, 2.4)})
    found = reach(curve, other, ["fid"])

    assert (found.step, found.better) == (20, 40)
    assert found.by_seed == {0: 20, 1: 40, 2: 40}


def test_a_recipe_that_gets_worse_again_has_not_reached_the_other():
    """Only what holds until the last step counts."""
    other = make_curve({40: (1.0, 2.0, 3.0)})
    curve = make_curve({10: (0.5, 1.6, 2.4), 20: (1.5, 2.4, 3.6), 40: (1.5, 2.4, 3.6)})

    assert reach(curve, other, ["fid"]).step is None
    assert reach(curve, other, ["fid"]).by_seed == {0: None, 1: None, 2: None}


def test_higher_ssim_is_better():
    """The same numbers as FID and as SSIM have opposite answers; a recipe reaches itself at its last step."""
    values, end = {10: (0.5, 0.5), 20: (0.7, 0.7)}, {20: (0.6, 0.6)}

    assert reach(make_curve(values, "ssim"), make_curve(end, "ssim"), ["ssim"]).step == 20
    assert reach(make_curve(values), make_curve(end), ["fid"]).step is None
    assert reach(make_curve(values, "ssim"), make_curve(values, "ssim"), ["ssim"]).step == 20


def test_one_seed_compares_the_values_themselves():
    """Without an interval nothing is better beyond it; without a common seed nothing is reached."""
    found = reach(make_curve({10: (1.1,), 20: (1.0,)}), make_curve({20: (1.0,)}), ["fid"])
    apart = Curve("b", {20: {5: {"fid": 9.0}}})

    assert (found.step, found.better, found.by_seed) == (20, None, {0: 20})
    assert reach(make_curve({10: (1.1,)}), apart, ["fid"]).step is None
    assert seconds_ratio(make_curve({10: (1.1,)}), 10, apart) is None


def test_all_of_several_metrics_are_required(cells):
    """By FID 20 steps suffice; SSIM is reached there, too, and at 10 steps neither."""
    curves = read_curves(cells, ROWS).rows
    found = {names: reach(curves["output"], curves["noise"], names).step for names in (("fid",), ("fid", "ssim"))}

    assert found == {("fid",): 20, ("fid", "ssim"): 20}
    assert reach(curves["noise"], curves["output"], ["fid", "ssim"]).step is None


def test_seconds_are_paired_by_seed(cells):
    """The output recipe's 20 steps of 1.5, 1.6, 1.7 s over 40 of 1.0, 1.1, 1.2 s."""
    curves = read_curves(cells, ROWS).rows
    found = seconds_ratio(curves["output"], 20, curves["noise"])
    ratios = [0.75, 32 / 44, 34 / 48]
    mean = sum(ratios) / 3

    assert found.mean == pytest.approx(mean)
    spread = sqrt(sum((it - mean) ** 2 for it in ratios) / 2)
    assert found.half_width == pytest.approx(T_OF_THREE * spread / sqrt(3), rel=1e-4)


@pytest.fixture
def written(cells, tmp_path):
    """The folder with tables and plot that the command wrote, and the command's output."""
    given = ["--cells", str(cells), "--out", str(tmp_path / "out"), "--rows", ",".join(ROWS), "--preset", "digits"]
    result = CliRunner().invoke(main, ["curve-table", *given, "--command", "python -m flows compare --curve"])
    assert result.exit_code == 0, result.output
    return tmp_path / "out", result.output


def test_the_tables_have_a_row_for_each_recipe(written):
    """Values by steps, then the reach, then seconds, then values at equal seconds; the plot can be opened."""
    out, output = written
    fid, ssim, kid, reached, seconds, fid_at, ssim_at = tables(output)

    assert output == (out / "table.md").read_text()
    assert fid[0] == {"recipe": "noise", "10": "3.100 ± 0.248", "20": "2.100 ± 0.248", "40": "1.100 ± 0.248"}
    assert ssim[1]["40"] == "0.9500 ± 0.0248"
    assert kid[1]["40"] == "500.00 ± 0.00 ≈"
    assert [row["by"] for row in reached] == ["FID", "SSIM", "KID × 10³", "FID and SSIM"]
    assert reached[-1] == {
        "recipe": "output",
        "by": "FID and SSIM",
        "steps": "20",
        "of its steps": "0.50",
        "difference then": "-0.100 ± 0.000 and +0.0500 ± 0.0000",
        "seed by seed": "20",
        "seconds": "32.0 ± 5.0",
        "of its seconds": "0.73 ± 0.05",
        "better from": "20",
    }
    assert seconds[1]["20"] == "32.0 ± 5.0"
    assert fid_at[1] == {
        "recipe": "output",
        "11.0 s": "–",
        "22.0 s": "2.100 ± 0.248 (10)",
        "44.0 s": "1.000 ± 0.248 (20)",
    }
    assert ssim_at[0]["44.0 s"] == "0.8900 ± 0.0248 (40)"
    assert "on cpu, 2 threads; no other run of a flow computed on the machine meanwhile.\n" in output
    assert "Made by `python -m flows compare --curve`" in output
    with Image.open(BytesIO((out / "curve.png").read_bytes())) as image:
        assert min(image.size) > 300
    assert "seconds of training" in (out / "curve.svg").read_text()
    with (out / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 3
    (one,) = [row for row in rows if (row["recipe"], row["seed"], row["step"]) == ("output", "1", "20")]
    assert [float(one[name]) for name in ("fid", "ssim", "seconds")] == pytest.approx([1.0, 0.94, 32.0])


def test_the_json_compares_every_pair_of_recipes(cells):
    """It has all estimates as numbers, and the texts of each step."""
    summary = to_json(read_curves(cells, ROWS), "digits", "")

    assert summary["curves"]["noise"]["40"]["fid"]["mean"] == pytest.approx(1.1)
    assert summary["reach"]["noise"]["output"]["fid+ssim"]["step"] is None
    assert summary["reach"]["output"]["noise"]["fid"] == {
        "step": 20,
        "better": 20,
        "by_seed": dict.fromkeys(range(3), 20),
    }
    assert dict(zip(summary["header"], summary["rows"][0], strict=True))["seconds"] == "11.0 ± 2.5"


def test_the_first_row_is_the_one_compared_with(cells):
    """The order is that of --rows; noise never reaches what output has at its end."""
    reached = tables(to_markdown(read_curves(cells, ["output", "noise"]), "digits", ""))[3]

    assert {row["recipe"] for row in reached} == {"noise"}
    assert {row["steps"] for row in reached if row["by"] != "KID × 10³"} == {"not reached"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([{"alone": False}, {"alone": False}], "Not measured: seconds were taken in no cell."),
        (
            [{}, {"device": "gpu"}],
            "Not measured: seconds were taken on cpu, 2 threads and gpu, 2 threads, which do not",
        ),
        ([{}, {"alone": False}], "1 of 2 trainings are left out"),
    ],
)
def test_seconds_that_show_no_cost_are_left_out(write_cell, tmp_path, changes, words):
    """Those of trainings beside others, and those of several machines; the curve over steps stays."""
    for row, change in zip(ROWS, changes, strict=True):
        write_cell(row, 0, **change)
    curves = read_curves(tmp_path / "cells", ROWS)
    text = to_markdown(curves, "digits", "")
    figure = Figure()
    draw_curves(figure.subplots(), curves)

    assert words in text
    assert "One seed, so no intervals" in text
    assert len(figure.axes) == 3 * (1 + ("left out" in words))


def test_curves_of_good_models_stay_apart(cells):
    """SSIM is drawn as its distance from 1, by logarithm; so is KID, linear where a mean is near those below 0."""
    curves = read_curves(cells, ROWS)
    figure, near = Figure(), Figure()
    draw_curves(figure.subplots(), curves)
    panels = {axis.get_ylabel(): axis for axis in figure.axes}
    drawn = panels["1 − SSIM"].lines[0].get_ydata()
    for values in curves.baseline.points[curves.baseline.steps[0]].values():
        values["kid"] = 0.009
    draw_curves(near.subplots(), curves)

    assert [1 - value for value in drawn] == pytest.approx(
        [curves.baseline.estimate(step, "ssim").mean for step in curves.baseline.steps]
    )
    assert {name: axis.get_yscale() for name, axis in panels.items()} == {
        "FID": "log",
        "1 − SSIM": "log",
        "KID × 10³": "log",
    }
    assert {axis.get_yscale() for axis in near.axes if axis.get_ylabel() == "KID × 10³"} == {"symlog"}


def test_a_lost_time_is_counted(write_cell, tmp_path):
    """The output of a training may come from DVC's cache, without its provenance."""
    for row in ROWS:
        folder = write_cell(row, 0)
    (folder / "finetune.provenance.json").unlink()

    text = to_markdown(read_curves(tmp_path / "cells", ROWS), "digits", "")

    assert (
        "1 of 2 trainings are left out: they ran beside others or on several machines, or their times are lost." in text
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_images": 5}, "num_images is 4 and 5; measure both under one protocol"),
        ({"pruned": "d" * 64}, "both of seed 0, recovered two pruned models; compare recipes that begin with the same"),
        (
            {"steps": (10, 40)},
            r"noise-0 was measured at steps \[10, 20, 40\], output-0 at \[10, 40\]; compare one list",
        ),
    ],
)
def test_recipes_that_begin_otherwise_are_refused(write_cell, tmp_path, change, words):
    """In one line that names both cells."""
    write_cell("noise", 0)
    write_cell("output", 0, **change)

    with pytest.raises(InputError, match=words) as caught:
        read_curves(tmp_path / "cells", ROWS)
    assert len(caught.value.message.splitlines()) == 1


def test_a_cell_without_its_last_step_is_refused(write_cell, tmp_path):
    """Such as one that another flow wrote into the same row."""
    folder = write_cell("noise", 0)
    note = CellRecord(overrides={"seed": 0}, mlflow_run="run", row="noise")
    write_json(folder / CELL, note.model_dump(mode="json"))

    with pytest.raises(
        InputError, match=r"noise-0 names no finetune\.steps; give the folder of cells that compare --curve"
    ):
        read_curves(tmp_path / "cells", ROWS)


def test_cells_of_no_row_are_refused(cells):
    """Such as those of a sweep."""
    with pytest.raises(InputError, match="is in row 'noise', the rows are output; give the folder of cells"):
        read_curves(cells, ["output"])
