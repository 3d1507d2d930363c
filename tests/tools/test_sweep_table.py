"""The cells of a sweep: which are best, and their table and plot."""

import csv
import json
from io import BytesIO
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings, strategies
from PIL import Image

from stages.protocol.evaluation import METRICS, Difference, EvaluationRecord, Metric, Model, Pair
from stages.protocol.protocol import Protocol
from stages.runtime.errors import InputError
from stages.storage.files import write_json
from stages.tools.__main__ import main
from stages.tools.cells import CELL, CellRecord
from stages.tools.sweep_table import Point, find_front, rank, read_points, write_sweep_table
from tests.records import make_costs

DENSE_MACS = 1_000_000
FILES = {"table.md", "table.csv", "pareto.svg", "pareto.png", "sweep_table.json", "run.json"}


def make_model(macs, fid, *, is_distinct=True):
    """A model of these MACs and this FID, which differs from dense or cannot be told from it."""
    above = Difference(mean=0.1, half_width=0.05, is_distinct=is_distinct)

    def metric(name):
        value = fid if name == "fid" else 0.5
        return Metric(sets=[value, value], mean=value, half_width=0.02, above_dense=above if name == "fid" else None)

    return Model(
        params=20_000,
        macs=macs,
        attention_macs=0,
        size_bytes=1,
        weights_sha256="c" * 64,
        fid_pooled=fid,
        ssim_quantiles={},
        worst_pairs=[Pair(set=0, index=0, ssim=0.5, mse=0.1)],
        **{name: metric(name) for name in METRICS},
    )


def make_record(protocol, macs, fid, **how):
    """An evaluation whose finetuned model is such."""
    models = {"dense": make_model(DENSE_MACS, 0.5), "finetuned": make_model(macs, fid, **how)}
    return EvaluationRecord(
        protocol_id=protocol.id,
        protocol=protocol,
        dense_sha256="a" * 64,
        floor_fid=0.1,
        models=models,
    )


@pytest.fixture(scope="module")
def a_protocol():
    """Two sets of four images."""
    hashes = dict.fromkeys(("schedule_sha256", "extractor_sha256", "real_sha256"), "d" * 64)
    numbers = {"num_images": 4, "sets": 2, "seed": 3, "num_real_images": 10}
    kid = {"kid_subsets": 2, "kid_subset_size": 4, "neighbours": 2}
    words = {"sampler": {"steps": 2}, "precision": "float32", "extractor": "digits", "layer": "64"}
    return Protocol(**words, **numbers, **kid, **hashes)


@pytest.fixture
def write_cell(a_protocol, tmp_path):
    """Write a finished cell as a sweep does: its folder."""

    def write(name, macs=500_000, fid=1.0, overrides=None, protocol=None, **how):
        folder = tmp_path / "cells" / name
        record = make_record(protocol or a_protocol, macs, fid, **how)
        write_json(folder / "evaluation.json", record.model_dump(mode="json"))
        write_json(folder / "costs.json", make_costs(record).model_dump(mode="json"))
        cell = CellRecord(overrides=overrides or {"prune.target.macs": macs}, mlflow_run=f"run-{name}", ran=("prune",))
        write_json(folder / CELL, cell.model_dump(mode="json"))
        return folder

    return write


@pytest.fixture
def cells(write_cell, tmp_path):
    """Two criteria at two budgets, of which one cell is beaten in both."""
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
    """Make points of (MACs, FID, whether it differs from dense)."""
    cell = CellRecord(overrides={}, mlflow_run="")
    return [
        Point(str(index), cell, record, make_costs(record))
        for index, (macs, fid, is_distinct) in enumerate(values)
        for record in [make_record(protocol, macs, fid, is_distinct=is_distinct)]
    ]


def beats(one, other):
    """Whether one is at least as good in both, and better in one."""
    left, right = ((it.model.macs, it.model.fid.mean) for it in (one, other))
    return left != right and left[0] <= right[0] and left[1] <= right[1]


FEW = strategies.tuples(
    strategies.integers(1, 5).map(lambda it: it * 100_000),
    strategies.sampled_from([0.5, 1.0, 1.5, 2.0]),
    strategies.booleans(),
)
"""So few values that ties are the rule."""
WIDE = strategies.tuples(strategies.integers(1, 10**12), strategies.floats(0, 1e6), strategies.booleans())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(values=strategies.lists(FEW, min_size=1, max_size=8) | strategies.lists(WIDE, min_size=1, max_size=8))
def test_the_front_is_what_nothing_beats(a_protocol, values):
    """By brute force: each place on it is beaten by no point, and every unbeaten point's place is on it, once."""
    points = to_points(a_protocol, values)
    unbeaten = {(it.model.macs, it.model.fid.mean) for it in points if not any(beats(other, it) for other in points)}

    front = [(it.model.macs, it.model.fid.mean) for it in find_front(points)]

    assert len(front) == len(unbeaten)
    assert set(front) == unbeaten
    assert front == sorted(front)
    assert [fid for _, fid in front] == sorted((fid for _, fid in front), reverse=True)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(values=strategies.lists(FEW, min_size=1, max_size=8))
def test_the_best_is_the_smallest_that_cannot_be_told_from_dense(a_protocol, values):
    """Failing that the lowest FID; and each of the front has a rank."""
    front = find_front(to_points(a_protocol, values))

    ranked = rank(front)

    assert sorted(it.name for it in ranked) == sorted(it.name for it in front)
    alike = [it for it in front if it.is_like_dense]
    best = min(alike, key=lambda it: it.model.macs) if alike else min(front, key=lambda it: it.model.fid.mean)
    assert ranked[0] is best
    assert [it.is_like_dense for it in ranked] == sorted((it.is_like_dense for it in ranked), reverse=True)


def test_a_single_set_cannot_be_told(a_protocol):
    """Without an interval nothing is like dense, so FID decides."""
    (point,) = to_points(a_protocol, [(1, 1.0, None)])

    assert not point.is_like_dense


def test_the_cheapest_come_first(cells):
    """By MACs, then by FID, whatever the folders are called."""
    assert [point.name for point in read_points(cells)] == ["a", "b", "d", "c"]


def test_other_protocols_are_refused(write_cell, a_protocol, tmp_path):
    """With both cells in the words of the sweep, and what differs."""
    write_cell("a", overrides={"importance.criterion": "random"})
    other = a_protocol.model_copy(update={"num_images": 5})
    write_cell("b", overrides={"importance.criterion": "taylor"}, protocol=other)

    with pytest.raises(InputError, match="num_images is 4 and 5; measure both under one protocol") as caught:
        read_points(tmp_path / "cells")
    assert "criterion random and criterion taylor" in caught.value.message


@pytest.mark.parametrize("file", [CELL, "evaluation.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"surprise": 1}', ""])
def test_a_damaged_cell_is_named(write_cell, tmp_path, file, content):
    """In one line, with its file."""
    write_cell("good")
    (write_cell("bad") / file).write_text(content)

    with pytest.raises(InputError, match=f"bad/{file}") as caught:
        read_points(tmp_path / "cells")
    assert len(caught.value.message.splitlines()) == 1


def test_a_cell_without_its_evaluation_is_named(write_cell, tmp_path):
    """The note alone is no measurement."""
    (write_cell("bad") / "evaluation.json").unlink()

    with pytest.raises(InputError, match=r"bad/evaluation\.json: No such file"):
        read_points(tmp_path / "cells")


def test_a_cell_that_is_not_finished_does_not_count(write_cell, tmp_path):
    """Its note is what is written last."""
    write_cell("good")
    (write_cell("going-on") / CELL).unlink()

    assert [point.name for point in read_points(tmp_path / "cells")] == ["good"]


@pytest.mark.parametrize("exists", [True, False])
def test_no_cell_is_refused(tmp_path, exists):
    """With what to do, and nothing is written."""
    if exists:
        (tmp_path / "cells").mkdir()
    result = CliRunner().invoke(
        main, ["sweep-table", "--cells", str(tmp_path / "cells"), "--out", str(tmp_path / "out")]
    )

    assert result.exit_code == 1
    assert result.output == f"Error: {tmp_path}/cells holds no finished cell; run the flow first\n"
    assert not (tmp_path / "out").exists()


@pytest.fixture
def written(cells, tmp_path):
    """The folder with table and plot, and what was said."""
    result = CliRunner().invoke(main, ["sweep-table", "--cells", str(cells), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    return tmp_path / "out", result.output


def test_the_table_has_one_row_a_cell(written):
    """With what was set, what was measured and whether it is on the front; it is also what is said."""
    out, said = written
    text = (out / "table.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    header, _, *body = rows

    assert said == text
    assert header[:2] == ["importance.criterion", "prune.target.macs"]
    assert len(body) == 4
    assert all(len(row) == len(header) for row in rows)
    found = [dict(zip(header, row, strict=True)) for row in body]
    assert [row["MLflow run"] for row in found] == ["run-a", "run-b", "run-d", "run-c"]
    assert [row["front"] for row in found] == ["●", "", "●", ""]
    assert found[0]["MACs"] == "0.4 M (40.0%)"
    assert found[0]["FID"] == "2.000 ± 0.020"
    assert found[2]["FID"] == "1.000 ± 0.020 ≈"
    assert "Dense: 1.0 M MACs, FID 0.500 ± 0.020" in text
    assert "Protocol " in text


def test_what_programs_read_is_the_table(written):
    """The same rows, and the front's names, the best first."""
    out, said = written
    found = json.loads((out / "sweep_table.json").read_text())

    assert {path.name for path in out.iterdir()} == FILES
    assert f"| {' | '.join(found['header'])} |" == said.splitlines()[0]
    assert [f"| {' | '.join(row)} |" for row in found["rows"]] == said.splitlines()[2:6]
    assert found["best"] == ["d", "a"]


def test_the_csv_has_the_numbers(written, a_protocol):
    """Unrounded, with intervals, one row a cell."""
    with (written[0] / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    assert [row["mlflow_run"] for row in rows] == ["run-a", "run-b", "run-d", "run-c"]
    first = rows[0]
    assert (first["importance.criterion"], first["prune.target.macs"]) == ("taylor", "40%")
    assert [int(first["macs"]), float(first["macs_share"]), int(first["params"])] == [400_000, 0.4, 20_000]
    assert [float(first[name]) for name in METRICS] == [2.0, *[0.5] * (len(METRICS) - 1)]
    assert [float(first[f"{name}_interval"]) for name in METRICS] == [0.02] * len(METRICS)
    assert (float(first["latency_ms"]), first["ran"], first["protocol"]) == (2.5, "prune", a_protocol.id)


def test_the_plot_is_a_picture(written):
    """A PNG that opens and shows something, and an SVG that parses and names what is in it."""
    out, _ = written
    with Image.open(BytesIO((out / "pareto.png").read_bytes())) as image:
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert len(image.convert("RGB").getcolors(maxcolors=10**6)) > 10
    svg = (out / "pareto.svg").read_text()
    assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    for word in ("dense", "random", "taylor", "million MACs a pass"):
        assert word in svg


def test_equal_cells_make_equal_files(cells, tmp_path):
    """Byte by byte, pictures too; only the record of the run itself says when it was."""
    for name in ("one", "other"):
        write_sweep_table(cells, tmp_path / name)

    for name in FILES - {"run.json"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name


def test_a_table_is_replaced_by_that_of_more_cells(written, write_cell, cells):
    """A sweep that goes on writes it anew."""
    out, _ = written
    write_cell("e", 300_000, 9.0, {"importance.criterion": "magnitude", "prune.target.macs": "30%"})

    write_sweep_table(cells, out)

    assert json.loads((out / "sweep_table.json").read_text())["best"] == ["d", "a", "e"]
    assert len((out / "table.csv").read_text().splitlines()) == 6


@pytest.mark.parametrize("overrides", [{}, {"prune.compensate": None}, {"prune.include": ["a", "b"]}, {"x": "a|b,c"}])
def test_any_value_can_be_swept(write_cell, cells, tmp_path, overrides):
    """Nothing at all, null, a list, what would end a cell of the table: there is still one row a cell."""
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
        "" if it is None else str(it) for it in overrides.values()
    ]
    header, line, *body = [it for it in (tmp_path / "out" / "table.md").read_text().splitlines() if it[:1] == "|"]
    assert {it.replace("\\|", "").count("|") for it in (header, line, *body)} == {header.count("|")}
    assert len(body) == 2
