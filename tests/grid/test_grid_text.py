"""A grid's record -> where each model is best, in words and in figures."""

from functools import partial

import pytest

from stages.grid.report import make_verdict, to_markdown
from stages.protocol.evaluation import make_metric
from stages.protocol.grid import GridCell, GridRecord
from stages.report import grid_section
from stages.report.figures import draw_figure
from stages.report.grid_figure import PLOTS
from stages.report.grid_text import explain, summarise
from stages.storage.files import write_json
from tests.records import make_evaluation, make_model


@pytest.fixture
def record(protocol):
    """Make a grid of two settings from the FIDs of each model's sets: model -> steps -> values."""

    def make(fids, **changes):
        cells = []
        for steps in (5, 50):
            for model, values in fids.items():
                fid = values[steps]
                alike = make_metric([0.9] * len(fid))
                names = ["kid", "precision", "recall", "ssim_protocol"] + (["ssim"] if model != "dense" else [])
                dense = None if model == "dense" else fids["dense"][steps]
                metrics = dict.fromkeys(names, alike) | {"fid": make_metric(fid, dense)}
                setting = {"sampler": "DDIM leading", "steps": steps, "guidance": None, "protocol_id": "a" * 12}
                cells.append(GridCell(model=model, **setting, calls=steps, macs=steps * 10, metrics=metrics))
        sets = protocol.model_copy(update={"sets": len(fids["dense"][5])})
        weights = dict.fromkeys(fids, "a" * 64)
        return GridRecord(protocol_id=protocol.id, protocol=sets, weights_sha256=weights, cells=cells, **changes)

    return make


DENSE = {5: [3.0, 3.2, 3.1], 50: [1.0, 1.1, 1.2]}


def test_the_bests_are_compared_set_by_set(record):
    """A constant difference is distinct, whatever the sets themselves vary by; one with zero inside is not."""
    worse = record({"dense": DENSE, "finetuned": {5: [3.0] * 3, 50: [1.5, 1.61, 1.7]}})
    alike = record({"dense": DENSE, "finetuned": {5: [3.0] * 3, 50: [1.1, 1.0, 1.3]}})

    assert summarise(worse) == (
        "By FID, best are dense with 50 steps of DDIM leading (1.100 ± 0.248) and finetuned with 50 steps of DDIM "
        "leading (1.603 ± 0.249); the best of finetuned is 0.503 ± 0.014 above the best of dense, more than the "
        "interval."
    )
    assert "0.033 ± 0.287 above the best of dense, within the interval, so they cannot be told apart." in summarise(
        alike
    )
    better = record({"dense": DENSE, "finetuned": {5: [3.0] * 3, 50: [0.5, 0.61, 0.7]}})
    assert [make_verdict(it).level for it in (worse, alike, better)] == ["changed", "good", "good"]


def test_one_set_has_no_interval_and_says_so(record):
    """Neither the difference of the bests nor the cheapest setting can be judged."""
    one = record({"dense": {5: [3.0], 50: [1.0]}, "finetuned": {5: [2.0], 50: [1.5]}})

    assert summarise(one).endswith(
        "with one set there are no intervals, so that nothing says whether the bests differ."
    )
    assert not any("cannot be told" in line for line in explain(one))
    assert (one.cheapest("dense").steps, make_verdict(one).level) == (50, "changed")
    assert "One set, so no intervals." in to_markdown(one)


def test_the_cheapest_setting_that_cannot_be_told_from_the_best_is_named(record):
    """Of equal settings by FID the one with the fewest operations, or none."""
    grid = record({"dense": DENSE, "finetuned": {5: [1.4, 1.9, 1.6], 50: [1.5, 1.6, 1.7]}})
    dense, finetuned, *_ = explain(grid)

    assert dense == "dense: no cheaper setting has an FID that cannot be told from its best."
    assert "finetuned: by FID, 5 steps of DDIM leading cannot be told from its best (0.033 ± 0.574" in finetuned
    assert finetuned.endswith("at 10% of the MACs.")


def test_a_grid_with_a_hole_is_refused(record):
    """Each model has a cell at each setting, each once."""
    whole = record({"dense": DENSE, "finetuned": DENSE})
    for cells in (whole.cells[:-1], [*whole.cells, whole.cells[0]]):
        with pytest.raises(ValueError, match="cell"):
            GridRecord(**{**dict(whole), "cells": cells})


def test_the_figures_show_every_number_and_frame_the_best(record):
    """FID of both models, the same bytes for the same grid; and SSIM of all pairs that are compared."""
    grid = record({"dense": DENSE, "finetuned": {5: [30.0] * 3, 50: [1.5, 1.61, 1.7]}})
    fid, again = (draw_figure(partial(PLOTS["fid"], grid=grid), "light") for _ in range(2))

    assert fid.count(b"stroke: #cc4b3e") == 2
    assert fid == again
    assert draw_figure(partial(PLOTS["ssim"], grid=grid), "dark").count(b"stroke: #cc4b3e") == 3


def test_the_page_of_other_weights_shows_no_grid(record, protocol, tmp_path, monkeypatch, capsys):
    """Only a grid of the same weights; a damaged one gives a warning, and the page is made without it."""
    monkeypatch.setattr(grid_section, "draw_grid_figures", lambda _: {"fid": {"light": b"x"}})
    evaluation = make_evaluation(
        protocol.model_copy(update={"sets": 3}), {"dense": make_model(), "finetuned": make_model()}
    )
    grid = record({"dense": DENSE, "finetuned": DENSE})
    same = grid.model_copy(update={"weights_sha256": {"dense": "c" * 64, "finetuned": "c" * 64}})
    found = []
    for content in (None, grid.model_dump(mode="json"), same.model_dump(mode="json"), {}):
        if content is not None:
            write_json(tmp_path / "grid/grid.json", content)
        found.append(grid_section.read_section(tmp_path, evaluation))

    assert [section is not None for section in found] == [False, False, True, False]
    assert found[2].sentence == summarise(grid)
    assert "Warning: the page leaves the grid out" in capsys.readouterr().err
