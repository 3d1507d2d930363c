"""The verdict: a level and one sentence, by rules."""

import pytest

from stages.protocol.evaluation import Difference, Metric
from stages.protocol.verdict import judge, rate_fid, write_share
from tests.records import make_costs, make_evaluation, make_model

ALIKE = Metric(sets=[1.0, 1.0], mean=1.0, half_width=0.0)
INTERVAL = ("speed_up_low", "speed_up", "speed_up_high")


@pytest.fixture
def judged(protocol):
    """Judge a finetuned model against a dense one with FID 1, the larger than the floor .4, on 100 pairs.

    A speed is (low, mean, high), or None where it was not measured; `rise` is (mean, half-width) above dense.
    """

    def make(visible=0, rise=(0.0, 0.1), speed=(1.1, 1.2, 1.3), ssim=0.99, params=0.5, macs=0.5):
        mean, half_width = rise
        above = Difference(
            mean=mean, half_width=half_width, is_distinct=None if half_width is None else abs(mean) > half_width
        )
        fid = Metric(sets=[1 + mean] * 2, mean=1 + mean, half_width=half_width, above_dense=above)
        similar = Metric(sets=[ssim] * 2, mean=ssim, half_width=0.0)
        rest = dict.fromkeys(("kid", "precision", "recall", "ssim", "mse"), ALIKE)
        size = {"params": round(1000 * params), "macs": round(1000 * macs), "visible_pairs": visible}
        models = {
            "dense": make_model({**rest, "fid": ALIKE}, params=1000, macs=1000, visible_pairs=0),
            "finetuned": make_model({**rest, "fid": fid, "ssim": similar}, **size),
        }
        record = make_evaluation(protocol.model_copy(update={"sets": 2, "num_images": 50}), models)
        costs = make_costs(record)
        values = dict(zip(INTERVAL, speed or (None,) * 3, strict=True))
        rows = [costs.costs[0], costs.costs[1].model_copy(update=values)]
        return record, costs.model_copy(update={"costs": rows})

    return make


def test_the_sentence_says_what_was_gained_and_what_it_cost(judged):
    """Size, speed with its device, pictures and FID, in this order."""
    verdict = judge(*judged(visible=1))

    assert verdict.level == "good"
    assert verdict.sentence == (
        "Half the size and 1.20× as fast (cpu, batch 1); pictures differ visibly in 1 of 100; FID cannot be told from "
        "dense."
    )


def test_a_model_that_lost_begins_with_the_loss(judged):
    """What it gained comes last."""
    verdict = judge(*judged(visible=97, rise=(8.0, 0.3), ssim=0.104))

    assert verdict.level == "worse"
    assert verdict.sentence == (
        "Worse than the dense model: pictures differ visibly in 97 of 100; FID rose from 1.000 to 9.000; half the size "
        "and 1.20× as fast (cpu, batch 1)."
    )


@pytest.mark.parametrize(
    ("visible", "rise", "level"),
    [
        (10, (0.0, 0.25), "good"),
        (11, (0.0, 0.1), "changed"),
        (10, (0.2, 0.06), "changed"),
        (0, (1.2, 0.1), "worse"),
        (0, (1.05, 0.1), "changed"),
        (50, (0.0, 0.26), "changed"),
        (51, (0.0, 0.25), "changed"),
        (51, (0.0, 0.26), "worse"),
        (100, (-0.5, 0.1), "changed"),
        (0, (1.0, None), "changed"),
        (0, (1.01, None), "worse"),
        (0, (0.25, None), "good"),
    ],
)
def test_the_level_follows_fid_and_pictures(judged, visible, rise, level):
    """Other pictures are worse only where the interval does not show that FID is kept; an FID twice as high always."""
    assert judge(*judged(visible, rise)).level == level


@pytest.mark.parametrize(
    ("speed", "text", "level"),
    [
        ((0.99, 1.4, 1.8), "not measurably faster (cpu, batch 1)", "good"),
        ((1.0, 1.1, 1.2), "not measurably faster (cpu, batch 1)", "good"),
        ((1.01, 1.1, 1.2), "1.10× as fast (cpu, batch 1)", "good"),
        ((1.02, 1.03, 1.04), "1.03× as fast (cpu, batch 1)", "good"),
        ((1.001, 1.002, 1.003), "not measurably faster (cpu, batch 1)", "good"),
        ((0.7, 0.8, 0.9), "0.80× as fast (cpu, batch 1)", "changed"),
        (None, "its speed was not measured", "good"),
    ],
)
def test_a_speed_up_whose_interval_spans_1_is_none(judged, speed, text, level):
    """A slower model is not good."""
    verdict = judge(*judged(speed=speed))

    assert f"Half the size and {text};" in verdict.sentence
    assert verdict.level == level


@pytest.mark.parametrize(
    ("params", "macs", "text"),
    [
        (0.519, 0.5, "Half the size and"),
        (0.53, 0.53, "47 % smaller and"),
        (0.554, 0.559, "45 % smaller and"),
        (0.33, 0.34, "A third of the size and"),
        (0.26, 0.25, "A quarter of the size and"),
        (0.6, 0.5, "40 % smaller, 50 % fewer MACs and"),
        (0.9, 0.44, "10 % smaller, 56 % fewer MACs and"),
        (1.0, 1.0, "The same size and"),
        (1.2, 1.2, "20 % larger and"),
    ],
)
def test_the_size_is_that_of_the_parameters(judged, params, macs, text):
    """With the MACs where they were cut by another share."""
    assert judge(*judged(params=params, macs=macs)).sentence.startswith(text)


def test_a_model_that_gains_nothing_is_not_good(judged):
    """Neither smaller nor measurably faster."""
    assert judge(*judged(params=1.0, macs=1.0, speed=(0.9, 1.0, 1.1))).level == "changed"


@pytest.mark.parametrize(
    ("params", "macs", "speed"), [(0.95, 1.0, None), (1.0, 0.95, None), (1.0, 1.0, (1.1, 1.2, 1.3))]
)
def test_one_gain_is_enough(judged, params, macs, speed):
    """Fewer parameters, fewer MACs or a higher speed."""
    assert judge(*judged(params=params, macs=macs, speed=speed)).level == "good"


def test_a_coarse_interval_is_named(judged):
    """That FID cannot be told apart means little where it could be anything."""
    verdict = judge(*judged(rise=(5.0, 40.0)))

    assert verdict.sentence.endswith("FID cannot be told from dense within ± 40.")
    assert verdict.level == "changed"


def test_one_set_has_no_interval(judged):
    """The sentence says so."""
    assert "FID rose from 1.000 to 1.250 (one set, so no interval)." in judge(*judged(rise=(0.25, None))).sentence
    assert "FID is 1.000 in both (one set, so no interval)." in judge(*judged(rise=(0.0, None))).sentence


def test_the_floor_is_the_scale_of_a_better_dense_model(judged):
    """A rise of FID far below the distance of real images from real images is none to speak of."""
    record, _ = judged(rise=(1.2, 0.1))

    assert rate_fid(record, "finetuned") == "lost"
    assert rate_fid(record.model_copy(update={"floor_fid": 10.0}), "finetuned") == "kept"


@pytest.mark.parametrize(
    ("ssim", "half_width", "level"),
    [
        (0.98, 0.1, "good"),
        (0.9, 0.1, "changed"),
        (0.104, 0.1, "changed"),
        (0.5, 0.26, "changed"),
        (0.49, 0.26, "worse"),
    ],
)
def test_an_older_record_is_judged_by_its_mean_ssim(judged, ssim, half_width, level):
    """Its pairs were not counted; other pictures are worse where FID may have risen."""
    verdict = judge(*judged(visible=None, rise=(0.0, half_width), ssim=ssim))

    assert f"pictures have SSIM {ssim:.2f} against dense" in verdict.sentence
    assert verdict.level == level


def test_every_reason_names_its_limit(judged):
    """Numbers, limits and the meaning of visible."""
    text = " ".join(judge(*judged(visible=3)).reasons)

    assert "3 of 100 pairs have SSIM below 0.9, which is visible side by side" in text
    assert "kept up to +0.25, lost above +1" in text
    assert "95 % interval 1.10 to 1.30" in text


@pytest.mark.parametrize(
    ("count", "total", "text"),
    [
        (0, 2500, "none of 2,500"),
        (2500, 2500, "all of 2,500"),
        (94, 2500, "4 of 100"),
        (3, 2500, "3 of 2,500"),
        (2499, 2500, "2,499 of 2,500"),
        (3, 16, "3 of 16"),
    ],
)
def test_a_share_never_rounds_to_none_or_all(count, total, text):
    """Few of many are written as they are."""
    assert write_share(count, total) == text
