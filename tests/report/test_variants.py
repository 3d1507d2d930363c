"""The table of models and variants."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.protocol.costs import Cost, CostsRecord
from stages.protocol.evaluation import Metric
from stages.protocol.variants import MEASURED, Variant, VariantsRecord
from stages.report.variants import join_variants, pareto_front, variants_to_markdown
from stages.runtime.errors import InputError
from tests.records import make_evaluation, make_model

HALF = Metric(sets=[0.5, 0.5], mean=0.5, half_width=0.25)
ONE = Metric(sets=[1.0, 1.0], mean=1.0, half_width=0.001)


@pytest.fixture
def records(protocol):
    """An evaluation, two variants of the finetuned model, and the times of all five."""
    metrics = dict.fromkeys(("fid", "kid", "precision", "recall", "ssim", "mse", "fid_dense"), HALF)
    unpaired = {"fid_dense_unpaired": HALF}
    evaluation = make_evaluation(protocol, {name: make_model(metrics | unpaired) for name in ("dense", "finetuned")})
    common = {"model": "finetuned", "size_bytes": 2_500_000, "metrics": dict.fromkeys(MEASURED, HALF)}
    variants = {
        "finetuned+onnx": Variant(**common, form="onnx", interval=1, sha256="d" * 64, ssim_to_model=ONE),
        "finetuned+int8+cache-2": Variant(**common, form="int8", interval=2, sha256="e" * 64),
    }
    hashes = {"dense": "c" * 64, "finetuned": "c" * 64, **{name: it.sha256 for name, it in variants.items()}}
    rows = [
        Cost(
            model=name,
            batch=batch,
            precision="float32",
            mode="onnxruntime" if "onnx" in name else "eager",
            device="cpu",
            median_ms=None if batch == 99 else 2.0 * batch,
            images_per_s=None if batch == 99 else 500,
            speed_up=1.5,
            speed_up_low=1.4,
            speed_up_high=1.6,
            peak_bytes=2**20,
        )
        for batch in (1, 16, 99)
        for name in hashes
    ]
    record = VariantsRecord(protocol_id=protocol.id, variants=variants)
    return evaluation, record, CostsRecord(weights_sha256=hashes, costs=rows)


def test_variants_stand_below_their_model(records):
    """With parts joined by plus signs, bytes, metrics, and the times of the first and the largest batch."""
    rows = join_variants(*records)
    lines = variants_to_markdown(rows).splitlines()

    assert [row.name for row in rows] == ["dense", "finetuned", "finetuned + onnx", "finetuned + int8 + cache-2"]
    assert lines[4] == (
        "| finetuned + onnx | 2.50 MB | 0.500 ± 0.250 | 0.500 ± 0.250 | 500.00 ± 250.00 | 0.500 ± 0.250 "
        "| 1.000 ± 0.001 | 2.00 ms | 500 | 1.0 MiB | 1.50× (1.40–1.60) |"
    )
    assert "| 0.500 ± 0.250 | – |" in lines[3]
    assert "| 0.500 ± 0.250 | – |" in lines[5]  # of a record from before it was measured
    assert "Images/s: of one pass at batch 16." in lines[-1]


def test_without_variants_there_is_no_table(records):
    """Nor are times needed."""
    evaluation, _, _ = records

    assert join_variants(evaluation, VariantsRecord(variants={}), None) == []


def test_what_does_not_belong_together_is_refused(records):
    """Variants under another protocol, times that are missing or of other files."""
    evaluation, record, costs = records

    with pytest.raises(
        InputError, match=r"measured under protocol 0123, models under .*; run the variants stage again"
    ):
        join_variants(evaluation, record.model_copy(update={"protocol_id": "0123"}), costs)
    other = costs.model_copy(update={"weights_sha256": {**costs.weights_sha256, "finetuned+onnx": "f" * 64}})
    for wrong in (None, other):
        with pytest.raises(InputError, match="the times of the variants are missing, or are of others; run the costs"):
            join_variants(evaluation, record, wrong)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_no_point_beats_one_of_the_front(points):
    """And every other point is beaten by one of it, or is equal to one."""
    front = pareto_front(points, tuple)

    def beats(one, other):
        return one != other and one[0] <= other[0] and one[1] <= other[1]

    assert not [it for it in front if any(beats(point, it) for point in points)]
    assert all(point in front or any(beats(it, point) for it in front) for point in points)
