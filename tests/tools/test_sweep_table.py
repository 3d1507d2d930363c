"""Sweeps: the Pareto front, its ranking, the table and the plot."""

import csv
import json
from io import BytesIO
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings, strategies
from PIL import Image

from stages.protocol.evaluation import METRICS, Difference, Metric, read_evaluation
from stages.protocol.protocol import Protocol
from stages.runtime.errors import InputError
from stages.storage.files import read_json, write_json
from stages.tools.__main__ import main
from stages.tools.comparison.cells import CELL, CellRecord, FinishedCell
from stages.tools.comparison.sweep_settings import Setting, find_front, rank, read_sweep
from stages.tools.comparison.sweep_table import make_lead, write_sweep_table
from tests.markdown import tables
from tests.records import make_costs, make_evaluation, make_model, write_cell_files, write_variants

DENSE_MACS = 1_000_000
FILES = {"index.html", "table.md", "table.csv", "pareto.svg", "pareto.png", "sweep_table.json", "run.json"}


def make_point(macs, fid, *, is_distinct=True, fid_dense=None, unpaired=None):
    """Make a model with these MACs and this FID, whose difference from dense is distinct or not.

    Without FIDs to dense, paired and unpaired, it was evaluated before these were measured.
    """
    above = Difference(mean=0.1, half_width=0.05, is_distinct=is_distinct)
    metrics = {
        name: Metric(sets=[value, value], mean=value, half_width=0.02)
        for name in METRICS
        for value in [fid if name == "fid" else 0.5]
    }
    metrics["fid"] = metrics["fid"].model_copy(update={"above_dense": above})
    if fid_dense is not None:
        metrics["fid_dense"] = Metric(sets=[fid_dense] * 2, mean=fid_dense, half_width=0.01)
    if unpaired is not None:
        metrics["fid_dense_unpaired"] = Metric(sets=[unpaired] * 2, mean=unpaired, half_width=None)
    return make_model(metrics, params=20_000, macs=macs)


def make_record(protocol, macs, fid, **options):
    """Make an evaluation of the dense model and one finetuned model."""
    dense = {"fid_dense": 0.0, "unpaired": 0.4} if "fid_dense" in options else {}
    models = {"dense": make_point(DENSE_MACS, 0.5, **dense), "finetuned": make_point(macs, fid, **options)}
    return make_evaluation(protocol, models)


@pytest.fixture(scope="module")
def a_protocol():
    """A protocol with two sets of four images."""
    hashes = dict.fromkeys(("schedule_sha256", "extractor_sha256", "real_sha256"), "d" * 64)
    numbers = {"num_images": 4, "sets": 2, "seed": 3, "num_real_images": 10}
    kid = {"kid_subsets": 2, "kid_subset_size": 4, "neighbours": 2}
    texts = {"sampler": {"steps": 2}, "precision": "float32", "extractor": "digits", "layer": "64"}
    return Protocol(**texts, **numbers, **kid, **hashes)


@pytest.fixture
def write_cell(a_protocol, tmp_path):
    """Write a finished cell as a sweep does, and return its folder."""

    def write(name, macs=500_000, fid=1.0, overrides=None, protocol=None, **options):
        folder = tmp_path / "cells" / name
        record = make_record(protocol or a_protocol, macs, fid, **options)
        given = overrides or {"prune.target.macs": macs}
        return write_cell_files(folder, record, overrides=given, mlflow_run=f"run-{name}", ran=("prune",))

    return write


@pytest.fixture
def cells(write_cell, tmp_path):
    """Two criteria at two budgets; cells a and d form the front."""
    for name, criterion, macs, fid in (
        ("b", "random", 400_000, 3.0),
        ("a", "taylor", 400_000, 2.0),
        ("d", "random", 700_000, 1.0),
        ("c", "taylor", 700_000, 1.5),
    ):
        overrides = {"importance.criterion": criterion, "prune.target.macs": f"{macs // 10_000}%"}
        write_cell(name, macs, fid, overrides, is_distinct=name != "d")
    return tmp_path / "cells"


def to_points(protocol, values):
    """Make points from (MACs, FID, whether FID differs from dense)."""
    note = CellRecord(overrides={}, mlflow_run="")
    return [
        Setting((FinishedCell(str(index), note, record, make_costs(record)),), {})
        for index, (macs, fid, is_distinct) in enumerate(values)
        for record in [make_record(protocol, macs, fid, is_distinct=is_distinct)]
    ]


def macs_and_fid(point):
    """Return both coordinates of a point."""
    return point.macs, point.fid.mean


def dominates(one, other):
    """Whether one point is at least as good as the other in both coordinates, and better in one."""
    left, right = macs_and_fid(one), macs_and_fid(other)
    return left != right and left[0] <= right[0] and left[1] <= right[1]


FEW = strategies.tuples(
    strategies.integers(1, 5).map(lambda count: count * 100_000),
    strategies.sampled_from([0.5, 1.0, 1.5, 2.0]),
    strategies.booleans(),
)
"""Few values, so that ties are frequent."""
WIDE = strategies.tuples(strategies.integers(1, 10**12), strategies.floats(0, 1e6), strategies.booleans())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(values=strategies.lists(FEW, min_size=1, max_size=8) | strategies.lists(WIDE, min_size=1, max_size=8))
def test_the_front_is_what_nothing_dominates(a_protocol, values):
    """The front has the coordinates of every point that no other dominates, each once and ordered by MACs."""
    points = to_points(a_protocol, values)
    expected = {macs_and_fid(one) for one in points if not any(dominates(other, one) for other in points)}

    front = [macs_and_fid(point) for point in find_front(points)]

    assert len(front) == len(expected)
    assert set(front) == expected
    assert front == sorted(front)
    assert [fid for _, fid in front] == sorted((fid for _, fid in front), reverse=True)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(values=strategies.lists(FEW, min_size=1, max_size=8))
def test_the_best_is_the_smallest_like_dense(a_protocol, values):
    """Without a point like dense, the best has the lowest FID; each point of the front has a rank."""
    front = find_front(to_points(a_protocol, values))

    ranked = rank(front)

    assert sorted(it.first.name for it in ranked) == sorted(it.first.name for it in front)
    alike = [point for point in front if point.is_like_dense]
    best = min(alike or front, key=lambda point: point.macs if alike else point.fid.mean)
    assert ranked[0] is best
    is_like_dense = [point.is_like_dense for point in ranked]
    assert is_like_dense == sorted(is_like_dense, reverse=True)


def test_a_single_set_is_never_like_dense(a_protocol):
    """Without an interval, the ranking depends on FID alone."""
    (point,) = to_points(a_protocol, [(1, 1.0, None)])

    assert not point.is_like_dense


def test_cells_are_ordered_by_cost(cells):
    """The order is by MACs, then by FID, and not by the names of the folders."""
    assert [it.first.name for it in read_sweep(cells).settings] == ["a", "b", "d", "c"]


def test_different_protocols_are_refused(write_cell, a_protocol, tmp_path):
    """The error names the field that differs and the overrides of both cells."""
    write_cell("a", overrides={"importance.criterion": "random"})
    other = a_protocol.model_copy(update={"num_images": 5})
    write_cell("b", overrides={"importance.criterion": "taylor"}, protocol=other)

    with pytest.raises(InputError, match="num_images is 4 and 5; measure both under one protocol") as caught:
        read_sweep(tmp_path / "cells")
    assert "criterion random and criterion taylor" in caught.value.message


def test_two_dense_models_are_refused(write_cell, tmp_path):
    """The line of the dense model, the front and the best setting would mix both."""
    write_cell("a", overrides={"fetch.model.name": "one"})
    other = write_cell("b", overrides={"fetch.model.name": "other"}) / "evaluation.json"
    other.write_text(other.read_text().replace(read_json(other)["dense_sha256"], "b" * 64))

    with pytest.raises(InputError, match="name one and name other were pruned from two dense models"):
        read_sweep(tmp_path / "cells")


@pytest.mark.parametrize("file", [CELL, "evaluation.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"surprise": 1}', ""])
def test_a_damaged_cell_is_named(write_cell, tmp_path, file, content):
    """One line names the damaged file."""
    write_cell("good")
    (write_cell("bad") / file).write_text(content)

    with pytest.raises(InputError, match=f"bad/{file}") as caught:
        read_sweep(tmp_path / "cells")
    assert len(caught.value.message.splitlines()) == 1


def test_a_cell_without_its_evaluation_is_named(write_cell, tmp_path):
    """A cell.json without evaluation.json is an error."""
    (write_cell("bad") / "evaluation.json").unlink()

    with pytest.raises(InputError, match=r"bad/evaluation\.json: No such file"):
        read_sweep(tmp_path / "cells")


@pytest.fixture
def write_seeds(write_cell, a_protocol):
    """Write the cells of one criterion: seed -> FID; the order of their names is not that of the seeds."""

    def write(criterion, fids, macs=400_000, **options):
        for seed, fid in fids.items():
            overrides = {"importance.criterion": criterion, "seed": seed}
            protocol = a_protocol.model_copy(update={"seed": seed})
            write_cell(f"{criterion}-{9 - seed}", macs + 1000 * seed, fid, overrides, protocol, **options)

    return write


def test_a_swept_seed_becomes_intervals(write_seeds, tmp_path):
    """Settings are rows; differences from the baseline are paired by seed, of the seeds of both: .4 and .6."""
    write_seeds("taylor", {0: 1.0, 1: 2.0, 2: 3.0})
    write_seeds("random", {1: 2.4, 2: 3.6})
    write_sweep_table(tmp_path / "cells", tmp_path / "out", "taylor-8")
    text = (tmp_path / "out" / "table.md").read_text()
    taylor, random = tables(text)[0]

    assert (taylor["importance.criterion"], taylor["seeds"], taylor["MACs"]) == ("taylor", "3", "0.4 M (40.1%)")
    assert taylor["FID"] == "2.000 ± 2.484 ≈"
    assert (taylor["FID difference"], random["FID difference"]) == ("–", "+0.500 ± 1.271 ≈")
    assert random["SSIM difference"] == "+0.0000 ± 0.0000 ≈"
    assert "Dense: 1.0 M MACs, FID 0.500 ± 0.000. ± is half of the 95 % interval over the seeds" in text
    assert "Differences are from criterion taylor. " in text
    assert "seeds 0, 1, 2" in text
    assert json.loads((tmp_path / "out" / "sweep_table.json").read_text())["best"] == ["taylor-9"]
    assert len((tmp_path / "out" / "table.csv").read_text().splitlines()) == 6


def test_a_setting_with_one_seed_left_has_no_interval(write_seeds, tmp_path):
    """And is not like dense, whatever its sets say: beside others its interval would be another kind of number."""
    write_seeds("taylor", {0: 3.0, 1: 4.0})
    write_seeds("random", {0: 2.9}, macs=500_000, is_distinct=False)
    sweep = read_sweep(tmp_path / "cells")
    write_sweep_table(tmp_path / "cells", tmp_path / "out")
    taylor, random = tables((tmp_path / "out" / "table.md").read_text())[0]

    assert [setting.is_like_dense for setting in sweep.settings] == [True, False]
    assert (taylor["seeds"], random["seeds"], random["FID"]) == ("2", "1", "2.900")
    assert "FID difference" not in random


def test_two_settings_with_one_seed_each_show_the_seeds(write_seeds, tmp_path):
    """What is left of a sweep over seeds of which the others failed."""
    write_seeds("taylor", {0: 3.0})
    write_seeds("random", {1: 2.9})
    write_sweep_table(tmp_path / "cells", tmp_path / "out", "taylor-9")
    text = (tmp_path / "out" / "table.md").read_text()
    rows = {row["importance.criterion"]: row["FID difference"] for row in tables(text)[0]}

    assert rows == {"taylor": "–", "random": "–"}
    assert "seeds 0, 1" in text


def test_the_seed_alone_can_be_swept(write_cell, a_protocol, tmp_path):
    """One row without differences, and a name for it on the page."""
    for seed, fid in enumerate((0.5, 9.0)):
        write_cell(f"s{seed}", 400_000, fid, {"seed": seed}, a_protocol.model_copy(update={"seed": seed}))
    write_sweep_table(tmp_path / "cells", tmp_path / "out", "s0")
    (row,) = tables((tmp_path / "out" / "table.md").read_text())[0]
    lead = make_lead(read_sweep(tmp_path / "cells"))

    assert "FID difference" not in row
    assert row["FID"].startswith("4.750 ± ")
    assert lead.verdict.sentence.startswith("FID 4.750 ± ")
    assert [reason.partition(":")[0] for reason in lead.verdict.reasons] == [f"finetuned, seed {it}" for it in (0, 1)]


def test_a_baseline_that_is_no_cell_is_refused(cells, tmp_path):
    """One line, and nothing is written."""
    with pytest.raises(InputError, match="has no finished cell 'z' to compare with; it has 4 others"):
        write_sweep_table(cells, tmp_path / "out", "z")
    assert not (tmp_path / "out").exists()


def test_variants_of_a_sweep_over_seeds_are_joined(write_seeds, tmp_path):
    """Like the models that they are made of: mean, interval and difference over the seeds."""
    write_seeds("taylor", {0: 1.0, 1: 2.0})
    for name, fid in (("taylor-9", 1.5), ("taylor-8", 2.7)):
        folder = tmp_path / "cells" / name
        write_variants(folder, read_evaluation(folder), {"dense": 0.75, "finetuned": fid})
    write_sweep_table(tmp_path / "cells", tmp_path / "out")
    (row,), (dense, result) = tables((tmp_path / "out" / "table.md").read_text())

    assert (row["latency"], row["speed-up"]) == ("2.50 ± 0.00 ms", "1.20 ± 0.00×")
    assert (dense["variant"], dense["FID"]) == ("pretrained + int8", "0.750 ± 0.000")
    assert (result["variant"], result["difference"]) == ("finetuned + int8", "+0.600 ± 1.271 ≈")


def test_dense_variants_that_one_cell_lacks_come_from_another(cells, tmp_path):
    """Where the block variants itself is swept."""
    for name, models in (("a", {"finetuned": 2.5}), ("b", {"dense": 0.75})):
        write_variants(cells / name, read_evaluation(cells / name), models)
    write_sweep_table(cells, tmp_path / "out")
    rows = tables((tmp_path / "out" / "table.md").read_text())[1]

    assert [row["variant"] for row in rows] == ["dense + int8", "finetuned + int8"]


def test_an_unfinished_cell_is_ignored(write_cell, tmp_path):
    """A folder without cell.json, which is written last, is not read."""
    write_cell("good")
    (write_cell("unfinished") / CELL).unlink()

    assert [it.first.name for it in read_sweep(tmp_path / "cells").settings] == ["good"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_cells_is_refused(tmp_path, exists):
    """The error says what to do, and nothing is written."""
    if exists:
        (tmp_path / "cells").mkdir()
    result = CliRunner().invoke(
        main, ["sweep-table", "--cells", str(tmp_path / "cells"), "--out", str(tmp_path / "out")]
    )

    assert result.exit_code == 1
    assert result.output == f"Error: {tmp_path}/cells holds no finished cell; run the flow sweep or compare first\n"
    assert not (tmp_path / "out").exists()


@pytest.fixture
def written(cells, tmp_path):
    """The folder with table and plot that the command wrote, and the command's output."""
    result = CliRunner().invoke(main, ["sweep-table", "--cells", str(cells), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    return tmp_path / "out", result.output


def test_the_table_has_one_row_a_cell(written):
    """Each row has the overrides, the metrics and the mark of the front; the command prints the table."""
    out, output = written
    text = (out / "table.md").read_text()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    header, _, *body = lines

    assert output == text
    assert header[:2] == ["importance.criterion", "prune.target.macs"]
    assert len(body) == 4
    assert all(len(line) == len(header) for line in lines)
    rows = [dict(zip(header, row, strict=True)) for row in body]
    assert [row["MLflow run"] for row in rows] == ["run-a", "run-b", "run-d", "run-c"]
    assert [row["front"] for row in rows] == ["●", "", "●", ""]
    assert rows[0]["MACs"] == "0.4 M (40.0%)"
    assert rows[0]["FID"] == "2.000 ± 0.020"
    assert rows[2]["FID"] == "1.000 ± 0.020 ≈"
    assert "Dense: 1.0 M MACs, FID 0.500 ± 0.020" in text
    assert "Protocol " in text


def test_the_json_has_the_rows_of_the_table(written):
    """It also has the names of the front's cells, the best first."""
    out, output = written
    summary = json.loads((out / "sweep_table.json").read_text())

    assert {path.name for path in out.iterdir()} == FILES
    assert f"| {' | '.join(summary['header'])} |" == output.splitlines()[0]
    assert [f"| {' | '.join(row)} |" for row in summary["rows"]] == output.splitlines()[2:6]
    assert summary["best"] == ["d", "a"]


def test_the_csv_has_the_numbers(written, a_protocol):
    """Each cell has one row with unrounded numbers and intervals."""
    with (written[0] / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    assert [row["mlflow_run"] for row in rows] == ["run-a", "run-b", "run-d", "run-c"]
    first = rows[0]
    assert (first["importance.criterion"], first["prune.target.macs"]) == ("taylor", "40%")
    assert [int(first["macs"]), float(first["macs_share"]), int(first["params"])] == [400_000, 0.4, 20_000]
    assert [float(first[name]) for name in METRICS] == [2.0, *[0.5] * (len(METRICS) - 1)]
    assert [float(first[f"{name}_interval"]) for name in METRICS] == [0.02] * len(METRICS)
    assert (first["latency_precision"], first["latency_deterministic"]) == ("float32", "False")
    assert "Latency: median of a pass, batch 1, float32, eager, kernels chosen for speed, cpu." in (
        (written[0] / "table.md").read_text()
    )
    assert (float(first["latency_ms"]), first["ran"], first["protocol"]) == (2.5, "prune", a_protocol.id)


def test_the_plot_is_a_picture(written):
    """The PNG can be opened and is not empty, and the SVG can be parsed and contains all labels."""
    out, _ = written
    with Image.open(BytesIO((out / "pareto.png").read_bytes())) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(maxcolors=10**6)) > 10
    svg = (out / "pareto.svg").read_text()
    assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    for label in ("dense", "random", "taylor", "million MACs a pass"):
        assert label in svg


def test_fid_to_dense_has_a_column(write_cell, tmp_path):
    """With its interval in table and CSV, and the floor's meaning below; a cell from before it has a dash."""
    write_cell("new", 400_000, fid_dense=0.07, unpaired=0.45)
    write_cell("old", 700_000)
    write_sweep_table(tmp_path / "cells", tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    header, _, *rows = ([cell.strip() for cell in line.split("|")] for line in text.splitlines()[:4])
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        numbers = [(row["fid_dense"], row["fid_dense_interval"]) for row in csv.DictReader(file)]

    assert [row[header.index("FID to dense")] for row in rows] == ["0.070 ± 0.010", "–"]
    assert numbers == [("0.07", "0.01"), ("", "")]
    assert "floor: two dense sets from different noise" in text


def test_variants_have_a_table_of_their_own(cells, tmp_path):
    """Each with its cell's values; those of the dense model, which all cells share, stand once."""
    for name, fid in (("a", 2.5), ("b", 3.5)):
        record = read_evaluation(cells / name)
        write_variants(cells / name, record, {"dense": 0.75, "finetuned": fid}, costs=make_costs(record, 1.5))
    write_sweep_table(cells, tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        fids = [row["finetuned+int8.fid"] for row in csv.DictReader(file)]

    rows = {(row["importance.criterion"], row["variant"]): row["speed-up"] for row in tables(text)[1]}

    assert {row["speed-up"] for row in tables(text)[0]} == {"1.20× (1.15–1.25)"}

    assert rows["–", "dense + int8"] == "1.00× (0.95–1.05)"
    assert rows["taylor", "finetuned + int8"] == "1.50× (1.45–1.55)"
    assert "| – | – | dense + int8 | 1.25 MB | 0.750 | 0.750 |" in text
    assert "| taylor | 40% | finetuned + int8 | 1.25 MB | 2.500 | 2.500 |" in text
    assert text.count("dense + int8") == 1
    assert fids == ["2.5", "3.5", "", ""]


def test_equal_cells_make_equal_files(cells, tmp_path):
    """Every file but the run record is equal byte for byte, plots included."""
    for name in ("one", "other"):
        write_sweep_table(cells, tmp_path / name)

    for name in FILES - {"run.json"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name


def test_a_table_is_replaced(written, write_cell, cells):
    """A sweep with one more cell overwrites the table of the earlier cells."""
    out, _ = written
    write_cell("e", 300_000, 9.0, {"importance.criterion": "magnitude", "prune.target.macs": "30%"})

    write_sweep_table(cells, out)

    assert json.loads((out / "sweep_table.json").read_text())["best"] == ["d", "a", "e"]
    assert len((out / "table.csv").read_text().splitlines()) == 6


@pytest.mark.parametrize("overrides", [{}, {"prune.compensate": None}, {"prune.include": ["a", "b"]}, {"x": "a|b,c"}])
def test_any_value_can_be_swept(write_cell, cells, tmp_path, overrides):
    """No override, null, a list and separators of CSV and Markdown all give one row per cell."""
    for cell in cells.iterdir():
        for file in cell.iterdir():
            file.unlink()
    for name, macs in (("one", 400_000), ("two", 700_000)):
        folder = write_cell(name, macs)
        write_json(folder / CELL, {"overrides": overrides, "mlflow_run": name})
    write_sweep_table(cells, tmp_path / "out")

    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["mlflow_run"] for row in rows] == ["one", "two"]
    assert [row[key] for row in rows[:1] for key in overrides] == [
        "" if value is None else str(value) for value in overrides.values()
    ]
    header, line, *body = [text for text in (tmp_path / "out" / "table.md").read_text().splitlines() if text[:1] == "|"]
    assert {text.replace("\\|", "").count("|") for text in (header, line, *body)} == {header.count("|")}
    assert len(body) == 2


def test_values_are_written_as_they_are_typed(write_cell, tmp_path):
    """Blocks, lists and null as YAML in one line, in table and label."""
    loss = {"min_snr": None, "noise": 1.0}
    write_cell("one", 400_000, overrides={"prune.depth": None, "finetune.loss": loss})
    write_cell("two", 700_000, overrides={"prune.depth": {"names": ["a", "b"], "remove": 2}, "finetune.loss": loss})
    write_sweep_table(tmp_path / "cells", tmp_path / "out")
    text = (tmp_path / "out" / "table.md").read_text()

    assert [row["prune.depth"] for row in tables(text)[0]] == ["null", "{names: [a, b], remove: 2}"]
    assert "All cells: loss {min_snr: null, noise: 1.0}." in text
