"""Method comparisons: pairing by seed, intervals over seeds, tables and plots."""

import csv
import json
import shutil
from io import BytesIO
from math import sqrt
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner
from PIL import Image

from stages.protocol.costs import VARIANT_COSTS
from stages.protocol.evaluation import Metric, read_evaluation
from stages.runtime.errors import InputError
from stages.storage.files import write_json
from stages.tools.__main__ import main
from stages.tools.comparison.cells import COSTS_FOLDER
from stages.tools.comparison.method_table import write_method_table
from stages.tools.comparison.methods import read_comparison
from stages.tools.comparison.published import ABLATION, BASELINE, read_published
from tests.markdown import tables
from tests.records import make_costs, make_evaluation, write_cell_files, write_variants
from tests.servers import ROOT
from tests.tools.test_sweep_table import DENSE_MACS, make_point

T_OF_TWO, T_OF_THREE = 12.7062, 4.3027
"""Student's t at 97.5 % with one and with two degrees of freedom."""
FIDS = {BASELINE: (2.0, 3.0, 4.0), "random": (2.5, 3.4, 4.6), "ours": (2.1, 2.9, 4.0)}
FILES = {"index.html", "table.md", "table.csv", "method_table.json", "pareto.svg", "pareto.png", "run.json"}


def make_record(protocol, fid, ssim, fid_dense=None, floor=None):
    """Make an evaluation whose finetuned model has these FIDs and whose pruned model has this SSIM."""
    both = {} if fid_dense is None else {"fid_dense": 0.0, "unpaired": floor}
    models = {"dense": make_point(DENSE_MACS, 0.5, **both), "pruned": make_point(500_000, 9.0, **both)}
    models["finetuned"] = make_point(500_000, fid, **both | ({"fid_dense": fid_dense} if both else {}))
    alike = Metric(sets=[ssim, ssim], mean=ssim, half_width=0.0)
    models["pruned"] = models["pruned"].model_copy(update={"ssim": alike})
    return make_evaluation(protocol, models)


@pytest.fixture
def write_cell(protocol, tmp_path):
    """Write a finished cell as a comparison does, and return its folder."""

    def write(row, seed, fid=1.0, ssim=0.5, *, changes=None, dense=None, fids_dense=(), **overrides):
        folder = tmp_path / "cells" / f"{row}-{seed}-{'-'.join(map(str, overrides.values()))}"
        record = make_record(protocol.model_copy(update={"seed": seed, **(changes or {})}), fid, ssim, *fids_dense)
        if dense:
            record = record.model_copy(update={"dense_sha256": dense})
        given = {"finetune.steps": 450, "seed": seed} | {
            key.replace("__", "."): value for key, value in overrides.items()
        }
        note = {"overrides": given, "mlflow_run": f"run-{row}-{seed}", "ran": ("prune",), "row": row}
        return write_cell_files(folder, record, **note)

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
    """The seeds give 2, 3 and 4, with mean 3 and standard deviation 1."""
    fid = read_comparison(cells).methods[BASELINE].estimate("fid")

    assert fid.mean == pytest.approx(3)
    assert fid.half_width == pytest.approx(T_OF_THREE / sqrt(3), rel=1e-4)


def test_a_difference_is_taken_seed_by_seed(cells):
    """Differences .5, .4, .6 have a narrower interval than either method; differences .1, −.1, 0 are not distinct."""
    comparison = read_comparison(cells)
    clear, unclear = (comparison.difference(comparison.methods[row], "fid") for row in ("random", "ours"))

    assert clear.mean == pytest.approx(0.5)
    assert clear.half_width == pytest.approx(T_OF_THREE * 0.1 / sqrt(3), rel=1e-4)
    assert unclear.half_width == pytest.approx(T_OF_THREE * 0.1 / sqrt(3), rel=1e-4)
    assert (clear.is_distinct, unclear.is_distinct) == (True, False)
    assert comparison.difference(comparison.methods[BASELINE], "fid") is None


def test_variants_are_compared_with_the_model_that_they_are_made_of(write_cell, tmp_path):
    """Paired by seed; the dense model's stand once, first, and a cell of another protocol is one line."""
    for row, fids in (("random", (2.5, 3.4, 4.6)), ("ours", (2.1, 2.9, 4.0))):
        for seed, fid in enumerate(fids):
            folder = write_cell(row, seed, fid, fids_dense=(0.2, 0.5))
            record = read_evaluation(folder)
            write_variants(folder, record, {"dense": 0.5 + 0.1 * seed, "finetuned": fid + 0.1 * (seed + 1)})
    write_method_table(tmp_path / "cells", tmp_path / "out", "digits", "")
    rows = {row["variant"]: row for row in tables((tmp_path / "out" / "table.md").read_text())[1]}
    summary = json.loads((tmp_path / "out" / "method_table.json").read_text())["variants"]
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        numbers = {(row["row"], row["seed"]): float(row["finetuned+int8.fid"]) for row in csv.DictReader(file)}

    assert list(rows) == ["pretrained + int8", "random + int8", "ours + int8"]
    assert rows["ours + int8"]["speed-up"] == "–"
    assert (rows["ours + int8"]["difference"], rows["ours + int8"]["seeds"]) == ("+0.200 ± 0.248 ≈", "3")
    assert rows["ours + int8"]["on disk"] == "1.25 MB"
    assert summary["pretrained + int8"]["fid"]["mean"] == pytest.approx(0.6)
    assert summary["random + int8"]["fid_difference"]["mean"] == pytest.approx(0.2)
    assert numbers["ours", "1"] == pytest.approx(3.1)

    write_variants(folder, record, {"dense": 1.0}, protocol_id="0" * 12)
    with pytest.raises(InputError, match=r"ours-2-.* has variants of protocol 000000000000 and models of"):
        write_method_table(tmp_path / "cells", tmp_path / "out", "digits", "")


def test_the_speed_up_of_a_variant_is_a_mean_over_the_seeds(write_cell, tmp_path):
    """Mean and interval of what each seed measured; none if a seed was not timed, or was on another device."""

    def write(seed, speed_up, device="cpu", *, timed=True):
        folder = write_cell("ours", seed, 2.0)
        record = read_evaluation(folder)
        costs = make_costs(record, speed_up, device) if timed else None
        write_variants(folder, record, {"dense": 0.5, "finetuned": 2.5}, costs=costs)
        return folder

    def read():
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        write_method_table(tmp_path / "cells", tmp_path / "out", "digits", "")
        text = (tmp_path / "out" / "table.md").read_text()
        return {row["variant"]: row["speed-up"] for row in tables(text)[1]}, text

    folders = [write(seed, speed_up) for seed, speed_up in enumerate((1.1, 1.2, 1.3))]
    found, text = read()
    summary = json.loads((tmp_path / "out" / "method_table.json").read_text())["variants"]
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        numbers = {row["seed"]: float(row["finetuned+int8.speed_up"]) for row in csv.DictReader(file)}

    assert found == {"pretrained + int8": "1.00 ± 0.00×", "ours + int8": "1.20 ± 0.25×"}
    assert summary["ours + int8"]["speed_up"]["mean"] == pytest.approx(1.2)
    assert numbers == {"0": 1.1, "1": 1.2, "2": 1.3}
    assert "Speed-up: relative to the dense model, passes timed in turn, batch 1, float32, eager" in text

    times = folders[2] / COSTS_FOLDER / VARIANT_COSTS
    whole = times.read_text()
    write_json(times, make_costs(read_evaluation(folders[2])).model_dump(mode="json"))
    with pytest.raises(InputError, match=r"ours-2-.* lacks times of some of its variants; remove its folder"):
        read()
    times.write_text(whole[:40])
    with pytest.raises(InputError, match=r"variants.json"):
        read()
    assert not (tmp_path / "out").exists()

    shutil.rmtree(folders[2])
    write(2, 1.3, "another cpu")
    assert set(read()[0].values()) == {"–"}

    shutil.rmtree(folders[2])
    write(2, 1.3, timed=False)
    found, text = read()
    assert set(found.values()) == {"–"}
    assert "Speed-up" not in text


def test_fid_to_dense_is_compared_like_fid(write_cell, tmp_path):
    """A mean over seeds, a difference paired by seed, and in the dense model's row the floor over the seeds."""
    for row, values in ((BASELINE, (0.1, 0.2, 0.3)), ("ours", (0.05, 0.16, 0.24))):
        for seed, value in enumerate(values):
            write_cell(row, seed, fids_dense=(value, 0.5 + 0.1 * seed))
    write_method_table(tmp_path / "cells", tmp_path / "out", "digits", "")
    dense, baseline, ours = tables((tmp_path / "out" / "table.md").read_text())[0]
    summary = json.loads((tmp_path / "out" / "method_table.json").read_text())
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        numbers = {(row["row"], row["seed"]): float(row["finetuned.fid_dense"]) for row in csv.DictReader(file)}

    assert dense["FID to dense"] == "floor 0.600 ± 0.248"
    assert (baseline["FID to dense"], baseline["FID to dense difference"]) == ("0.200 ± 0.248", "–")
    assert (ours["FID to dense"], ours["FID to dense difference"]) == ("0.150 ± 0.237", "-0.050 ± 0.025")
    assert summary["methods"]["ours"]["fid_dense_difference"]["is_distinct"] is True
    assert summary["fid_dense_floor"]["mean"] == pytest.approx(0.6)
    assert numbers["ours", "1"] == 0.16


def test_cells_from_before_fid_to_dense_have_no_number(write_cell, tmp_path):
    """Their seeds are left out of the difference, and their method has no mean; seeds of one set have no floor."""
    for seed in range(3):
        write_cell(BASELINE, seed, fids_dense=(0.1, None))
        write_cell("ours", seed, fids_dense=(0.2, None) if seed else ())
    write_method_table(tmp_path / "cells", tmp_path / "out", "digits", "")
    dense, _, ours = tables((tmp_path / "out" / "table.md").read_text())[0]

    assert (ours["FID to dense"], ours["FID to dense difference"]) == ("–", "+0.100 ± 0.000")
    assert read_comparison(tmp_path / "cells").fid_dense_floor is None
    assert dense["FID to dense"] == "–"


def test_only_common_seeds_are_paired(write_cell, tmp_path):
    """One common seed gives a difference without an interval; no common seed gives none."""
    for seed, fid in ((0, 2.0), (1, 3.0)):
        write_cell(BASELINE, seed, fid)
    for seed, fid in ((1, 3.5), (2, 9.0)):
        write_cell("random", seed, fid)
    write_cell("ours", 2, 1.0)
    comparison = read_comparison(tmp_path / "cells")
    differences = {row: comparison.difference(comparison.methods[row], "fid") for row in ("random", "ours")}

    assert (differences["random"].mean, differences["random"].half_width) == (0.5, None)
    assert differences["ours"] is None
    assert sorted(comparison.dense.models) == [0, 1, 2]


def test_the_ablation_measures_the_pruned_model(cells):
    """The SSIM of the pruned models is sorted by the number of timesteps."""
    ablation = read_comparison(cells).ablation

    assert list(ablation) == [50, 1000]
    assert ablation[50].mean == pytest.approx(0.65)
    assert ablation[50].half_width == pytest.approx(T_OF_TWO * 0.1 / sqrt(2) / sqrt(2), rel=1e-4)


def test_protocols_may_differ_in_the_seed_alone(write_cell, tmp_path):
    """Another field that differs is refused and named."""
    write_cell("random", 0)
    write_cell("random", 1)
    assert len(read_comparison(tmp_path / "cells").cells) == 2
    write_cell("random", 2, changes={"num_images": 5})

    with pytest.raises(InputError, match="num_images is 4 and 5; measure both under one protocol") as caught:
        read_comparison(tmp_path / "cells")
    assert "seed" not in caught.value.message


def test_two_dense_models_are_refused(write_cell, tmp_path):
    """SSIM against two different models cannot be compared."""
    write_cell("random", 0)
    write_cell("ours", 0, dense="b" * 64)

    with pytest.raises(InputError, match="were pruned from two dense models"):
        read_comparison(tmp_path / "cells")


def test_the_cells_of_a_sweep_are_refused(write_cell, tmp_path):
    """They belong to no row of a comparison."""
    write_cell("", 0)

    with pytest.raises(InputError, match="is not a row of a method comparison"):
        read_comparison(tmp_path / "cells")


@pytest.fixture
def written(cells, tmp_path):
    """The folder with table and plots that the command wrote, and the command's output."""
    options = ["--preset", "celeba-hq-64", "--command", "python -m flows compare --preset x"]
    result = CliRunner().invoke(main, ["method-table", "--cells", str(cells), "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    return tmp_path / "out", result.output


def test_the_table_has_one_row_a_method(written):
    """The dense model is first, the others follow in the paper's order; the command prints the table."""
    out, output = written
    ours, ablation, published, published_ablation = tables(output)

    assert output == (out / "table.md").read_text()
    assert [row["method"] for row in ours] == ["pretrained", "random", "diff-pruning T = .05", "ours"]
    assert [row["FID"] for row in ours][1:3] == ["3.500 ± 2.617", "3.000 ± 2.484"]
    assert [row["FID difference"] for row in ours][1:] == ["+0.500 ± 0.248", "–", "+0.000 ± 0.248 ≈"]
    assert [row["finetune steps"] for row in ours] == ["–", "450", "450", "450"]
    assert {row["seeds"] for row in ours} == {"3"}
    assert [row["SSIM"] for row in ablation] == ["0.6500 ± 0.6353", "0.8000 ± 0.0000"]
    assert (published[0]["FID"], published[-1]["FID"]) == ("6.48", "6.52")
    assert published_ablation[3] == {"timesteps used": "300", "SSIM": "0.842"}
    assert "seeds 0, 1, 2" in output
    assert "Made by `python -m flows compare --preset x`" in output
    assert "not to be compared with the tables above" in output


def test_the_json_has_the_rows_of_the_table(written):
    """It also has their estimates as numbers."""
    out, output = written
    summary = json.loads((out / "method_table.json").read_text())

    assert {path.name for path in out.iterdir()} == FILES | {"ablation.svg", "ablation.png"}
    assert [dict(zip(summary["header"], row, strict=True)) for row in summary["rows"]] == tables(output)[0]
    assert summary["methods"]["ours"]["fid"]["mean"] == pytest.approx(3.0)
    assert summary["methods"]["random"]["fid_difference"]["is_distinct"] is True
    assert summary["ablation"]["50"]["mean"] == pytest.approx(0.65)
    assert (summary["seeds"], summary["preset"]) == ([0, 1, 2], "celeba-hq-64")


def test_the_csv_has_one_row_a_cell(written):
    """Cells of the ablation are included, and every model has its numbers."""
    with (written[0] / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    assert len(rows) == 3 * len(FIDS) + 4
    (one,) = [row for row in rows if (row["row"], row["seed"]) == ("random", "1")]
    assert (float(one["finetuned.fid"]), float(one["pruned.fid"]), float(one["dense.fid"])) == (3.4, 9.0, 0.5)
    assert (one["mlflow_run"], one["importance.num_timesteps"]) == ("run-random-1", "")


@pytest.mark.parametrize(("name", "label"), [("pareto", "million MACs a pass"), ("ablation", "timesteps used")])
def test_a_plot_is_a_picture(written, name, label):
    """The PNG can be opened, and the SVG can be parsed and contains the axis label."""
    with Image.open(BytesIO((written[0] / f"{name}.png").read_bytes())) as image:
        assert min(image.size) > 300
    svg = (written[0] / f"{name}.svg").read_text()
    assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert label in svg


def test_one_seed_has_no_intervals(write_cell, tmp_path):
    """The text says so; a preset outside the paper has no published table, and without an ablation none is drawn."""
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
    """The dense model is the only row of the other table, and there is no plot of FID over MACs."""
    write_cell(ABLATION, 0, importance__num_timesteps=50)
    write_method_table(tmp_path / "cells", tmp_path / "out", "digits", "")

    dense, ablation = tables((tmp_path / "out" / "table.md").read_text())
    assert ([row["method"] for row in dense], len(ablation)) == (["pretrained"], 1)
    assert not (tmp_path / "out" / "pareto.svg").exists()


LATER = {
    "cifar10": {
        "DeepCache": (3.54e9, 4.70, 0),
        "O2MKD, four students": (3.3e9, 4.62, None),
        "2ndMatch: noise loss": (3.4e9, 5.29, 100_000),
        "2ndMatch: + output distillation": (3.4e9, 5.05, 100_000),
        "2ndMatch: + first-order Jacobian": (3.4e9, 5.14, 100_000),
        "2ndMatch: + second-order Jacobian": (3.4e9, 4.58, 100_000),
    },
    "lsun-church": {"diff-pruning": (138.8e9, 13.9, 500_000), "2ndMatch": (138.8e9, 11.25, 500_000)},
    "lsun-bedroom": {"diff-pruning": (138.8e9, 17.9, 800_000), "DeepCache": (156.0e9, 9.49, 0)},
    "imagenet-ldm": {"diff-pruning": (43.2e9, 10.23, None), "2ndMatch": (43.2e9, 5.68, None)},
}


@pytest.mark.parametrize("preset", LATER)
def test_later_papers_have_a_table_of_their_own(preset):
    """Their numbers stand beside no other protocol's, each table says that it is a single run."""
    theirs, later = read_published()[preset]
    rows = {row.method: (row.macs, row.fid, row.steps) for row in later.rows}

    assert {name: rows[name] for name in LATER[preset]} == LATER[preset]
    assert later.paper != theirs.paper
    assert all(table.protocol.endswith("single run, no interval") for table in (theirs, later))


def test_a_system_of_later_papers_alone_has_published_numbers():
    """Transformers: TinyFusion with and without distillation, and pruning by width."""
    (table,) = read_published()["imagenet-dit"]

    assert [row.macs for row in table.rows] == [None] * 4
    assert [row.fid for row in table.rows] == [5.73, 3.73, 2.86, 3.85]
    assert [row.speed for row in table.rows] == [1.96, 1.96, 1.96, 1.51]
    assert table.protocol.endswith("single run, no interval")


def test_published_rows_stand_below_a_comparison_of_a_preset(write_cell, tmp_path):
    """Every system of the file is a preset; TinyFusion's rows name no MACs, so none is of the comparison's size."""
    write_cell(BASELINE, 0)
    write_method_table(tmp_path / "cells", tmp_path / "out", "imagenet-dit", "")
    *_, published = tables((tmp_path / "out" / "table.md").read_text())

    assert set(read_published()) <= {path.stem for path in (ROOT / "recipes" / "presets").glob("*.yaml")}
    assert [(row["FID"], row["size"]) for row in published] == [
        ("5.73", "–"),
        ("3.73", "–"),
        ("2.86", "–"),
        ("3.85", "–"),
    ]


@pytest.mark.parametrize(
    ("macs", "here"),
    [(99_746_900_000, {100.7}), (138_871_400_000, {138.8}), (150_000_000_000, set())],
    ids=["the paper's MACs", "ratio .3", "another target"],
)
def test_published_rows_of_the_size_of_a_comparison_are_marked(write_cell, tmp_path, protocol, macs, here):
    """The dense model, and pruned models of these MACs; those of the other target of LSUN are not."""
    folder = write_cell(BASELINE, 0)
    sizes = {"dense": 248_688_400_000, "pruned": macs, "finetuned": macs}
    models = {name: make_point(size, 1.0) for name, size in sizes.items()}
    write_json(folder / "evaluation.json", make_evaluation(protocol, models).model_dump(mode="json"))
    write_method_table(tmp_path / "cells", tmp_path / "out", "lsun-church", "")
    _, *published = tables((tmp_path / "out" / "table.md").read_text())
    marked = [(row["method"], row["MACs"]) for table in published for row in table if row["size"] == "here"]

    assert {float(text.split()[0]) for name, text in marked if name != "pretrained"} == here
    assert [name for name, _ in marked].count("pretrained") == len(published) == 2
    assert all(row["size"] in ("here", "another") for table in published for row in table)
