"""The cells of a comparison: pairing by seed, intervals over seeds, tables and plots."""

import csv
import json
from io import BytesIO
from math import sqrt
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner
from PIL import Image

from stages.protocol.evaluation import EvaluationRecord, Metric
from stages.runtime.errors import InputError
from stages.storage.files import write_json
from stages.tools.__main__ import main
from stages.tools.cells import CELL, CellRecord
from stages.tools.method_table import write_method_table
from stages.tools.methods import read_comparison
from stages.tools.published import ABLATION, BASELINE
from tests.records import make_costs
from tests.tools.test_sweep_table import DENSE_MACS, make_model

T_OF_TWO, T_OF_THREE = 12.7062, 4.3027
"""Student's t at 97.5 % with one and with two degrees of freedom."""
FIDS = {BASELINE: (2.0, 3.0, 4.0), "random": (2.5, 3.4, 4.6), "ours": (2.1, 2.9, 4.0)}
FILES = {"table.md", "table.csv", "method_table.json", "pareto.svg", "pareto.png", "run.json"}


def make_record(protocol, fid, ssim):
    """An evaluation whose finetuned model has this FID, and whose pruned model has this SSIM."""
    models = {"dense": make_model(DENSE_MACS, 0.5), "pruned": make_model(500_000, 9.0)}
    models["finetuned"] = make_model(500_000, fid)
    alike = Metric(sets=[ssim, ssim], mean=ssim, half_width=0.0)
    models["pruned"] = models["pruned"].model_copy(update={"ssim": alike})
    return EvaluationRecord(
        protocol_id=protocol.id,
        protocol=protocol,
        dense_sha256="a" * 64,
        floor_fid=0.1,
        models=models,
    )


@pytest.fixture
def write_cell(protocol, tmp_path):
    """Write a finished cell as a comparison does: its folder."""

    def write(row, seed, fid=1.0, ssim=0.5, *, changes=None, dense=None, **overrides):
        folder = tmp_path / "cells" / f"{row}-{seed}-{'-'.join(map(str, overrides.values()))}"
        record = make_record(protocol.model_copy(update={"seed": seed, **(changes or {})}), fid, ssim)
        if dense:
            record = record.model_copy(update={"dense_sha256": dense})
        write_json(folder / "evaluation.json", record.model_dump(mode="json"))
        write_json(folder / "costs.json", make_costs(record).model_dump(mode="json"))
        given = {"finetune.steps": 450, "seed": seed} | {key.replace("__", "."): it for key, it in overrides.items()}
        cell = CellRecord(overrides=given, mlflow_run=f"run-{row}-{seed}", ran=("prune",), row=row)
        write_json(folder / CELL, cell.model_dump(mode="json"))
        return folder

    return write


@pytest.fixture
def cells(write_cell, tmp_path):
    """Three methods with three seeds each, and an ablation with two."""
    for row, fids in FIDS.items():
        for seed, fid in enumerate(fids):
            write_cell(row, seed, fid)
    for count, ssims in ((1000, (0.8, 0.8)), (50, (0.6, 0.7))):
        for seed, ssim in enumerate(ssims):
            write_cell(ABLATION, seed, ssim=ssim, importance__num_timesteps=count)
    return tmp_path / "cells"


def test_an_interval_is_over_seeds(cells):
    """Mean and Student's interval of 2, 3, 4, whose standard deviation is 1."""
    found = read_comparison(cells).methods[BASELINE].estimate("fid")

    assert found.mean == pytest.approx(3)
    assert found.half_width == pytest.approx(T_OF_THREE / sqrt(3), rel=1e-4)


def test_a_difference_is_taken_seed_by_seed(cells):
    """.5, .4, .6 above the baseline: far narrower than either's own interval; .1, −.1, 0 cannot be told from zero."""
    comparison = read_comparison(cells)
    clear, unclear = (comparison.difference(comparison.methods[row], "fid") for row in ("random", "ours"))

    assert clear.mean == pytest.approx(0.5)
    assert clear.half_width == pytest.approx(T_OF_THREE * 0.1 / sqrt(3), rel=1e-4)
    assert unclear.half_width == pytest.approx(T_OF_THREE * 0.1 / sqrt(3), rel=1e-4)
    assert (clear.is_distinct, unclear.is_distinct) == (True, False)
    assert comparison.difference(comparison.methods[BASELINE], "fid") is None


def test_only_seeds_of_both_are_paired(write_cell, tmp_path):
    """A cell that failed leaves the others comparable; without a seed in common there is no difference."""
    for seed, fid in ((0, 2.0), (1, 3.0)):
        write_cell(BASELINE, seed, fid)
    for seed, fid in ((1, 3.5), (2, 9.0)):
        write_cell("random", seed, fid)
    write_cell("ours", 2, 1.0)
    comparison = read_comparison(tmp_path / "cells")
    found = {row: comparison.difference(comparison.methods[row], "fid") for row in ("random", "ours")}

    assert (found["random"].mean, found["random"].half_width) == (0.5, None)
    assert found["ours"] is None
    assert sorted(comparison.dense.models) == [0, 1, 2]


def test_the_ablation_looks_at_the_pruned_model(cells):
    """Its SSIM by the number of timesteps, the fewest first."""
    found = read_comparison(cells).ablation

    assert list(found) == [50, 1000]
    assert found[50].mean == pytest.approx(0.65)
    assert found[50].half_width == pytest.approx(T_OF_TWO * 0.1 / sqrt(2) / sqrt(2), rel=1e-4)


def test_protocols_may_differ_in_the_seed_alone(write_cell, tmp_path):
    """Any other field is refused, and named."""
    write_cell("random", 0)
    write_cell("random", 1)
    assert len(read_comparison(tmp_path / "cells").cells) == 2
    write_cell("random", 2, changes={"num_images": 5})

    with pytest.raises(InputError, match="num_images is 4 and 5; measure both under one protocol") as caught:
        read_comparison(tmp_path / "cells")
    assert "seed" not in caught.value.message


def test_another_dense_model_is_refused(write_cell, tmp_path):
    """SSIM against another model is another number."""
    write_cell("random", 0)
    write_cell("ours", 0, dense="b" * 64)

    with pytest.raises(InputError, match="were cut from two dense models"):
        read_comparison(tmp_path / "cells")


def test_the_cells_of_a_sweep_are_refused(write_cell, tmp_path):
    """They are of no row."""
    write_cell("", 0)

    with pytest.raises(InputError, match="is of no row of a comparison"):
        read_comparison(tmp_path / "cells")


@pytest.fixture
def written(cells, tmp_path):
    """The folder with table and plots, as a door made it, and what was said."""
    options = ["--preset", "celeba-hq-64", "--command", "python -m flows compare --preset x"]
    result = CliRunner().invoke(main, ["method-table", "--cells", str(cells), "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    return tmp_path / "out", result.output


def tables(text):
    """Read the tables of a Markdown text, each row by its first cell."""
    found = []
    for block in text.split("\n\n"):
        if block.startswith("|"):
            lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
            assert {len(line) for line in lines} == {len(lines[0])}
            found.append([dict(zip(lines[0], line, strict=True)) for line in lines[2:]])
    return found


def test_the_table_has_one_row_a_method(written):
    """The dense model first, then in the paper's order, with what cannot be told apart marked; it is also said."""
    out, said = written
    ours, ablation, published, published_ablation = tables(said)

    assert said == (out / "table.md").read_text()
    assert [row["method"] for row in ours] == ["pretrained", "random", "diff-pruning T = .05", "ours"]
    assert [row["FID"] for row in ours][1:3] == ["3.500 ± 2.617", "3.000 ± 2.484"]
    assert [row["FID difference"] for row in ours][1:] == ["+0.500 ± 0.248", "–", "+0.000 ± 0.248 ≈"]
    assert [row["finetune steps"] for row in ours] == ["–", "450", "450", "450"]
    assert {row["seeds"] for row in ours} == {"3"}
    assert [row["SSIM"] for row in ablation] == ["0.6500 ± 0.6353", "0.8000 ± 0.0000"]
    assert (published[0]["FID"], published[-1]["FID"]) == ("6.48", "6.52")
    assert published_ablation[3] == {"timesteps used": "300", "SSIM": "0.842"}
    assert "seeds 0, 1, 2" in said
    assert "Made by `python -m flows compare --preset x`" in said
    assert "not to be compared with the tables above" in said


def test_what_programs_read_is_the_table(written):
    """The same rows as text, and their estimates as numbers."""
    out, said = written
    found = json.loads((out / "method_table.json").read_text())

    assert {path.name for path in out.iterdir()} == FILES | {"ablation.svg", "ablation.png"}
    assert [dict(zip(found["header"], row, strict=True)) for row in found["rows"]] == tables(said)[0]
    assert found["methods"]["ours"]["fid"]["mean"] == pytest.approx(3.0)
    assert found["methods"]["random"]["fid_difference"]["is_distinct"] is True
    assert found["ablation"]["50"]["mean"] == pytest.approx(0.65)
    assert (found["seeds"], found["preset"]) == ([0, 1, 2], "celeba-hq-64")


def test_the_csv_has_one_row_a_cell(written):
    """Those of the ablation, too, with the numbers of every model."""
    with (written[0] / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    assert len(rows) == 3 * len(FIDS) + 4
    (one,) = [row for row in rows if (row["row"], row["seed"]) == ("random", "1")]
    assert (float(one["finetuned.fid"]), float(one["pruned.fid"]), float(one["dense.fid"])) == (3.4, 9.0, 0.5)
    assert (one["mlflow_run"], one["importance.num_timesteps"]) == ("run-random-1", "")


@pytest.mark.parametrize(("name", "word"), [("pareto", "million MACs a pass"), ("ablation", "timesteps used")])
def test_a_plot_is_a_picture(written, name, word):
    """A PNG that opens and an SVG that parses and says what is drawn."""
    with Image.open(BytesIO((written[0] / f"{name}.png").read_bytes())) as image:
        assert min(image.size) > 300
    svg = (written[0] / f"{name}.svg").read_text()
    assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert word in svg


def test_one_seed_has_no_intervals(write_cell, tmp_path):
    """And says so; a system of ours has nothing published, and what was not run is not drawn."""
    write_cell(BASELINE, 0, 2.0)
    write_cell("ours", 0, 1.5)
    write_method_table(tmp_path / "cells", tmp_path / "out", "digits", "")
    text = (tmp_path / "out" / "table.md").read_text()
    (table,) = tables(text)

    assert [row["FID"] for row in table] == ["0.500", "2.000", "1.500"]
    assert table[2]["FID difference"] == "-0.500 (one seed)"
    assert "One seed, so no intervals" in text
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_an_ablation_alone_has_a_table(write_cell, tmp_path):
    """With the dense model beside it, and no plot of cost against quality."""
    write_cell(ABLATION, 0, importance__num_timesteps=50)
    write_method_table(tmp_path / "cells", tmp_path / "out", "digits", "")

    dense, ablation = tables((tmp_path / "out" / "table.md").read_text())
    assert ([row["method"] for row in dense], len(ablation)) == (["pretrained"], 1)
    assert not (tmp_path / "out" / "pareto.svg").exists()
