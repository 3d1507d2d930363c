"""Two evaluations beside each other."""

import numpy as np
import pytest
from click.testing import CliRunner

from stages.protocol.evaluation import METRICS, EvaluationRecord, Metric, Model, Pair
from stages.protocol.intervals import estimate
from stages.storage.files import write_json
from stages.tools.__main__ import main

DRAWS = np.random.default_rng(0)
FIDS = {"one": [1.0, 1.2, 0.9], "other": [1.5, 1.71, 1.39]}


def make_record(protocol, fids, dense="a"):
    """A record whose pruned model has these FIDs."""
    pair = Pair(set=0, index=0, ssim=0.5, mse=0.1)
    same = {"params": 1, "macs": 1, "attention_macs": 0, "size_bytes": 1, "weights_sha256": "c" * 64, "fid_pooled": 1}

    def model(values):
        metrics = {
            name: Metric(sets=values if name == "fid" else [0.5] * 3, **vars(estimate(values))) for name in METRICS
        }
        return Model(**same, ssim_quantiles={}, worst_pairs=[pair], **metrics)

    models = {"dense": model([0.1] * 3), "pruned": model(fids)}
    return EvaluationRecord(
        protocol_id=protocol.id, protocol=protocol, dense_sha256=dense * 64, floor_fid=0.4, models=models
    )


@pytest.fixture
def compared(tmp_path, protocol):
    """Write two records and compare them: exit code and what was said."""

    def compare(changes=None, dense="a", arguments=("--model", "pruned"), **run):
        three = protocol.model_copy(update={"sets": 3})
        records = {
            "one": make_record(three, FIDS["one"]),
            "other": make_record(three.model_copy(update=changes or {}), FIDS["other"], dense),
        }
        for name, record in records.items():
            write_json(tmp_path / name / "evaluation.json", record.model_dump(mode="json"))
            write_json(tmp_path / name / "run.json", {"code_sha256": "x"} | (run if name == "other" else {}))
        result = CliRunner().invoke(main, ["diff", str(tmp_path / "one"), str(tmp_path / "other"), *arguments])
        return result.exit_code, result.output

    return compare


def test_a_difference_has_sign_and_interval(compared):
    """How much the second is above the first, set by set: .5 ± .02, although each alone varies by .3."""
    code, said = compared()

    assert code == 0
    assert said.splitlines()[0] == "fid        +0.5 ± 0.0248, differs"
    assert "kid        +0 ± 0, no difference beyond the interval" in said


def test_other_protocols_are_refused_with_the_field(compared):
    """In one line."""
    code, said = compared({"seed": 9})

    assert code == 1
    assert "seed is 3 and 9; measure both under one protocol" in said
    assert len(said.splitlines()) == 1


def test_consistency_with_different_dense_models_is_no_comparison(compared):
    """FID still is."""
    _, said = compared(dense="b")

    assert "fid" in said
    assert "ssim" not in said


def test_other_code_is_warned_of(compared):
    """The protocol does not hold it."""
    _, said = compared(code_sha256="y")

    assert "were measured with different code_sha256" in said


def test_an_unknown_model_is_refused(compared):
    """With those that there are."""
    code, said = compared(arguments=("--model", "finetund"))

    assert code == 1
    assert "holds no model 'finetund'; it holds dense, pruned" in said
