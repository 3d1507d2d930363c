"""The tiles of the page: their colours follow the verdict."""

from types import SimpleNamespace

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from stages.protocol.evaluation import Difference, Metric
from stages.protocol.verdict import judge
from stages.report.figures import COLOURS, FIGURES, LEVELS
from stages.report.report_data import ReportData
from stages.report.speed import rows_by_setting, timed_model
from stages.report.tiles import headline_tiles
from tests.records import make_costs, make_evaluation, make_model


@pytest.fixture
def measured(protocol):
    """An evaluation of 100 pairs and its costs; `rise` is (mean, half-width) of FID above the dense model's of 1."""

    def make(visible, rise, speed_up):
        mean, half_width = rise
        above = Difference(mean=mean, half_width=half_width, is_distinct=abs(mean) > half_width)
        fid = Metric(sets=[1 + mean] * 2, mean=1 + mean, half_width=half_width, above_dense=above)
        rest = dict.fromkeys(
            ("kid", "precision", "recall", "ssim", "mse"), Metric(sets=[0.5] * 2, mean=0.5, half_width=0.1)
        )
        models = {
            "dense": make_model({**rest, "fid": Metric(sets=[1.0, 1.0], mean=1.0, half_width=0.0)}, params=2, macs=2),
            "finetuned": make_model({**rest, "fid": fid}, visible_pairs=visible),
        }
        record = make_evaluation(protocol.model_copy(update={"sets": 2, "num_images": 50}), models)
        return record, make_costs(record, speed_up)

    return make


@pytest.mark.parametrize(
    ("visible", "rise", "speed_up", "level", "tones"),
    [
        (2, (0.0, 0.1), 1.2, "good", {"speed-up": "good", "FID": "good", "differs visibly": "good"}),
        (2, (0.0, 0.1), 1.02, "good", {"speed-up": None, "FID": "good", "differs visibly": "good"}),
        (30, (0.0, 0.1), 1.2, "changed", {"speed-up": None, "FID": None, "differs visibly": "changed"}),
        (90, (0.0, 0.1), 1.2, "changed", {"speed-up": None, "FID": None, "differs visibly": "changed"}),
        (2, (0.0, 0.1), 0.8, "changed", {"speed-up": "changed", "FID": None, "differs visibly": None}),
        (2, (0.1, 4.0), 1.2, "changed", {"speed-up": None, "FID": "changed", "differs visibly": None}),
        (90, (8.0, 0.3), 1.2, "worse", {"speed-up": None, "FID": "worse", "differs visibly": "worse"}),
        (2, (8.0, 0.3), 0.8, "worse", {"speed-up": "changed", "FID": "worse", "differs visibly": None}),
    ],
)
def test_no_tile_contradicts_the_verdict(measured, visible, rise, speed_up, level, tones):
    """Green only below green and red only below red; what was kept, or cannot be told, is neutral."""
    record, costs = measured(visible, rise, speed_up)
    found = {tile.term: tile.tone for tile in headline_tiles(record, costs, None)}

    assert judge(record, costs).level == level
    assert {name: found[name] for name in tones} == tones
    assert found["MACs"] is found["params"] is None


@pytest.mark.parametrize(
    ("visible", "rise", "speed_up"),
    [(2, (0.0, 0.1), 1.2), (2, (0.0, 0.1), 0.8), (30, (0.0, 0.1), 1.2), (90, (8.0, 0.3), 0.8)],
)
def test_the_bar_of_a_speed_up_has_the_colour_of_its_tile(measured, visible, rise, speed_up):
    """A slower model is amber in both, and a faster one is green in both below a green verdict alone."""
    record, costs = measured(visible, rise, speed_up)
    twins = [row.model_copy(update={"model": "pruned"}) for row in costs.costs if row.model == "finetuned"]
    both = costs.model_copy(update={"costs": [*costs.costs, *twins]})
    ratio = SimpleNamespace(macs_ratio=lambda _: 2.0)
    report = SimpleNamespace(costs=both, record=ratio, verdict=lambda: judge(record, costs), has_equal_widths=True)
    axis = Figure().subplots()
    FIGURES["speed-up"](axis, report=report)
    (colour,) = {to_hex(bar.get_facecolor()) for bar in axis.patches}
    (tile,) = (tile for tile in headline_tiles(record, costs, None) if tile.term == "speed-up")

    assert colour == LEVELS.get(tile.tone, COLOURS["pruned"])


def test_a_speed_that_the_sentence_calls_none_is_neutral(measured):
    """1.00× with an interval just above 1: sentence and tile follow one rule."""
    record, costs = measured(2, (0.0, 0.1), 1.002)
    close = {"speed_up_low": 1.001, "speed_up_high": 1.003}
    rows = [costs.costs[0], costs.costs[1].model_copy(update=close)]
    costs = costs.model_copy(update={"costs": rows})

    assert "not measurably faster" in judge(record, costs).sentence
    assert {tile.term: tile.tone for tile in headline_tiles(record, costs, None)}["speed-up"] is None


@pytest.mark.parametrize(("macs", "has_twin"), [(1, True), (2, False)])
def test_the_times_of_finetuned_are_left_out_only_beside_a_twin(protocol, macs, has_twin):
    """Several rounds rank anew, and may cut other channels than one cut."""
    models = {"dense": make_model(), "pruned": make_model(), "finetuned": make_model(macs=macs)}
    record = make_evaluation(protocol.model_copy(update={"sets": 3}), models)
    report = object.__new__(ReportData)
    report.__dict__.update(record=record, costs=make_costs(record))

    assert [row.model for row in rows_by_setting(report)] == [*models][: 2 if has_twin else 3]
    assert timed_model(report) == ("pruned" if has_twin else "finetuned")
