"""The page of a sweep or a comparison: what it begins with, and that it stands alone."""

import re

import pytest

from stages.protocol.evaluation import Difference, Metric
from stages.storage.files import write_json
from stages.tools.comparison.curve_table import make_lead
from stages.tools.comparison.curves import read_curves
from stages.tools.comparison.method_table import write_method_table
from stages.tools.comparison.published import BASELINE
from stages.tools.comparison.sweep_table import write_sweep_table
from tests.records import make_evaluation, make_model, write_cell_files

STEPS = (5, 10)


def make_finetuned(fid, macs):
    """Make a model of this FID, told from the dense one's of 1 by an interval of ± .01, all pairs like its own."""
    above = Difference(mean=fid - 1, half_width=0.01, is_distinct=abs(fid - 1) > 0.01)
    similar = Metric(sets=[0.99] * 2, mean=0.99, half_width=0.0)
    metrics = {"fid": Metric(sets=[fid] * 2, mean=fid, half_width=0.01, above_dense=above), "ssim": similar}
    return make_model(make_two(metrics), params=macs, macs=macs, visible_pairs=0)


def make_two(metrics):
    """Add the metrics that a model of two sets needs."""
    alike = Metric(sets=[0.5] * 2, mean=0.5, half_width=0.0)
    return dict.fromkeys(("fid", "kid", "precision", "recall", "ssim", "mse"), alike) | metrics


@pytest.fixture
def write_cell(protocol, tmp_path):
    """Write a finished cell: its name, the FID of its finetuned model, and what changed it."""

    def write(name, fid, *, macs=50, row="", seed=3, **overrides):
        folder = tmp_path / "cells" / name
        two = protocol.model_copy(update={"sets": 2, "seed": seed})
        dense = make_model(make_two({"fid": Metric(sets=[1.0] * 2, mean=1.0, half_width=0.01)}), params=100, macs=100)
        models = {"dense": dense, "pruned": make_finetuned(9.0, macs), "finetuned": make_finetuned(fid, macs)}
        record = make_evaluation(two, models)
        early = make_evaluation(two, {"dense": dense, f"step-{STEPS[0]}": make_finetuned(fid + 1, macs)})
        write_json(folder / "snapshots.json", early.model_dump(mode="json"))
        given = {"finetune.steps": STEPS[-1], **overrides}
        write_cell_files(folder, record, overrides=given, mlflow_run="run", row=row)

    return write


def read_page(folder):
    """Return the page of a result folder and the text of its verdict; it asks for nothing from elsewhere."""
    page = (folder / "index.html").read_text()
    assert re.findall(r"(?:src|srcset|href)=\"(?!data:|#)([^\"]+)\"", page) == [
        path.name for path in sorted(folder.iterdir()) if path.name not in ("index.html", "run.json")
    ]
    level, verdict = re.search(r'class="verdict (\w+)".*?<p>(.*?)</p>', page, re.DOTALL).groups()
    return page, level, re.sub(r"<[^>]+>", "", verdict)


def test_a_sweep_begins_with_its_best_cell(write_cell, tmp_path):
    """Every cell's verdict follows; the colour is that of the best."""
    write_cell("a", 1.0, **{"prune.target.macs": "50%"})
    write_cell("b", 5.0, macs=20, **{"prune.target.macs": "20%"})
    write_sweep_table(tmp_path / "cells", tmp_path / "out")
    page, level, verdict = read_page(tmp_path / "out")

    assert level == "good"
    assert verdict.startswith("Good. Best of 2, macs 50%: Half the size and 1.20× as fast (cpu, batch 1);")
    assert "macs 20%: Worse than the dense model: " in page


def test_a_sweep_of_broken_models_is_red(write_cell, tmp_path):
    """The best of them is still worse than the dense model."""
    write_cell("a", 9.0)
    write_sweep_table(tmp_path / "cells", tmp_path / "out")

    assert read_page(tmp_path / "out")[1] == "worse"


def test_a_comparison_begins_with_the_method_of_the_lowest_fid(write_cell, tmp_path):
    """With its difference from the baseline."""
    for seed in (0, 1):
        write_cell(f"a{seed}", 1.1 + seed / 10, row=BASELINE, seed=seed)
        write_cell(f"b{seed}", 1.0 + seed / 10, row="ours", seed=seed)
    write_method_table(tmp_path / "cells", tmp_path / "out", "digits", "")
    page, level, verdict = read_page(tmp_path / "out")

    assert level == "good"
    assert verdict.startswith("Good. ours has the lowest FID of 2 methods: 1.050 ± ")
    assert "-0.100 ± 0.000 from " in verdict
    assert "Seed 1: Half the size" in page


def test_a_recovery_comparison_begins_with_the_fastest_recipe(write_cell, tmp_path):
    """Or says that none is faster than the first."""
    for row, fid in (("default", 2.0), ("quick", 0.9)):
        for seed in (0, 1):
            write_cell(f"{row}-{seed}", fid, row=row, seed=seed)
    for rows, words in (
        (["default", "quick"], "quick reaches after 5 steps"),
        (["quick", "default"], "No other recipe"),
    ):
        lead = make_lead(read_curves(tmp_path / "cells", rows), "digits")
        assert lead.verdict.sentence.startswith(words)
        assert lead.verdict.level == "good"  # that of the best recipe
