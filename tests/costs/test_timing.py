"""The truth table of speed."""

from functools import partial

import pytest
import torch

from stages.costs.params import CostsParams
from stages.costs.timing import measure_costs
from stages.models.complexity import measure_peak_bytes, weights_bytes
from stages.protocol.costs import CostsRecord
from stages.report.table import latency_to_text
from stages.runtime.device import cpu_name

QUICK = {"batches": (1, 2), "repeats": 6, "seconds": 60}


def test_every_setting_has_a_row_for_every_model(unet, make_unet):
    """Each with a time, its throughput, and in eager mode the memory that it took."""
    costs = measure_costs(
        {"dense": make_unet(), "small": make_unet(block_out_channels=(8, 16))},
        CostsParams(**QUICK, precisions=("float32", "bfloat16")),
    )

    assert {(cost.model, cost.batch, cost.precision, cost.mode) for cost in costs} == {
        (model, batch, precision, "eager")
        for model in ("dense", "small")
        for batch in (1, 2)
        for precision in ("float32", "bfloat16")
    }
    for cost in costs:
        assert cost.median_ms > 0
        assert cost.images_per_s == pytest.approx(cost.batch / cost.median_ms * 1e3)
    memory = {(cost.model, cost.precision, cost.batch): cost.peak_bytes for cost in costs}
    assert memory["small", "float32", 1] < memory["dense", "float32", 1] < memory["dense", "float32", 2]
    assert memory["dense", "bfloat16", 1] < memory["dense", "float32", 1]
    assert unet.dtype == torch.float32


def test_progress_counts_the_settings_that_plan_names(unet, capsys):
    """Each batch size of each precision is one; the last line has them all."""
    params = CostsParams(**QUICK, precisions=("float32", "bfloat16"))
    measure_costs({"dense": unet}, params)

    assert len(params.settings) == 4
    assert "time passes, setting 4/4" in capsys.readouterr().err


def test_equal_widths_share_their_rows(unet, make_unet):
    """A finetuned model computes what the pruned one does, so it is not timed again."""
    costs = measure_costs({"one": unet, "two": make_unet(seed=1)}, CostsParams(**QUICK))
    rows = {model: [vars(cost) | {"model": ""} for cost in costs if cost.model == model] for model in ("one", "two")}

    assert rows["one"] == rows["two"] != []


def test_what_takes_too_long_is_left_out_in_words(unet):
    """A batch whose six passes would not fit into the time of a row says so."""
    (small, large) = measure_costs({"dense": unet}, CostsParams(batches=(1, 100_000), repeats=6, seconds=5))

    assert small.median_ms
    assert large.median_ms is None
    assert large.left_out == "six passes would take more than 5 s"


def test_what_does_not_fit_into_memory_is_left_out_in_words(unet):
    """Found out from a single image, before anything is allocated."""
    (row,) = measure_costs({"dense": unet}, CostsParams(batches=(10**9,), repeats=6))

    assert "GiB" in row.left_out
    assert row.median_ms is None


def test_a_compiled_model_has_a_row_of_its_own(unet, monkeypatch):
    """The backend eager traces the model as the default backend does, and generates no code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    rows = measure_costs({"dense": unet}, CostsParams(batches=(1,), repeats=6, compiled=True))

    assert [row.mode for row in rows] == ["eager", "compiled"]
    assert rows[1].median_ms


def test_a_failing_compiler_leaves_its_row_out(unet, monkeypatch):
    """The other rows are measured all the same."""

    def fail(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fail)
    rows = measure_costs({"dense": unet}, CostsParams(batches=(1,), repeats=6, compiled=True))

    assert rows[0].median_ms
    assert rows[1].left_out == "failed with RuntimeError"


def test_what_fits_is_not_left_out(unet):
    """The guard counts weights once and activations for each image, as the measurement afterwards shows."""
    weights, one, many = weights_bytes(unet), measure_peak_bytes(unet, 1), measure_peak_bytes(unet, 64)

    assert many - weights == pytest.approx(64 * (one - weights), rel=0.05)
    (row,) = measure_costs({"dense": unet}, CostsParams(batches=(64,), repeats=6))
    assert row.median_ms
    assert row.peak_bytes == many


@pytest.mark.timed
def test_a_speed_up_is_a_median_of_ratios_with_its_interval(make_unet):
    """The model against itself is as fast as itself; a smaller one is faster, within an interval around its median."""
    models = {"dense": make_unet(sample_size=32), "small": make_unet(sample_size=32, block_out_channels=(4, 8))}
    dense, small = measure_costs(models, CostsParams(batches=(16,), repeats=10))

    assert (dense.speed_up_low, dense.speed_up, dense.speed_up_high) == (1, 1, 1)
    assert 1 < small.speed_up_low <= small.speed_up <= small.speed_up_high
    assert dense.passes == small.passes == 10
    assert dense.p95_ms is None


def test_a_record_from_before_the_setting_was_named_is_one_of_deterministic_kernels(unet):
    """The line below the results table names precision, mode and kernels."""
    (row,) = measure_costs({"dense": unet}, CostsParams(batches=(1,), repeats=6, deterministic=False))
    old = {name: value for name, value in row.model_dump().items() if name != "deterministic"}
    hashes = {"dense": "a" * 64}

    record = CostsRecord(weights_sha256=hashes, costs=[row])
    assert "batch 1, float32, eager, kernels chosen for speed, " in latency_to_text(record)
    record = CostsRecord.model_validate({"weights_sha256": hashes, "costs": [old]})
    assert "batch 1, float32, eager, deterministic kernels, " in latency_to_text(record)


def test_the_processor_is_named(tmp_path):
    """Times on two kinds do not compare; where the system says nothing there is still a name."""
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast One\nmodel name\t: Fast One\n")

    assert cpu_name(tmp_path / "cpuinfo") == "Fast One"
    assert cpu_name(tmp_path / "nothing")
