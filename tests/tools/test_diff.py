"""The difference of two evaluations."""

import numpy as np
import pytest
from click.testing import CliRunner

from stages.protocol.evaluation import Metric
from stages.protocol.intervals import estimate
from stages.storage.files import write_json
from stages.tools.__main__ import main
from tests.records import make_evaluation, make_model

DRAWS = np.random.default_rng(0)
FIDS = {"one": [1.0, 1.2, 0.9], "other": [1.5, 1.71, 1.39]}


def make_record(protocol, fids, dense="a", *, has_fid_dense=True):
    """Make a record whose pruned model has these FIDs, one per set, to the real images and to the dense model's."""

    def model(values):
        names = ("fid", "fid_dense") if has_fid_dense else ("fid",)
        return make_model(dict.fromkeys(names, Metric(sets=values, **vars(estimate(values)))))

    return make_evaluation(protocol, {"dense": model([0.1] * 3), "pruned": model(fids)}, dense)


@pytest.fixture
def compared(tmp_path, protocol):
    """Write two records and compare them: exit code and output."""

    def compare(changes=None, dense="a", arguments=("--model", "pruned"), *, has_fid_dense=True, **run):
        three = protocol.model_copy(update={"sets": 3})
        records = {
            "one": make_record(three, FIDS["one"], has_fid_dense=has_fid_dense),
            "other": make_record(three.model_copy(update=changes or {}), FIDS["other"], dense),
        }
        for name, record in records.items():
            write_json(tmp_path / name / "evaluation.json", record.model_dump(mode="json"))
            write_json(tmp_path / name / "run.json", {"packages": {"torch": "2"}} | (run if name == "other" else {}))
        result = CliRunner().invoke(main, ["diff", str(tmp_path / "one"), str(tmp_path / "other"), *arguments])
        return result.exit_code, result.output

    return compare


def test_a_difference_has_sign_and_interval(compared):
    """Paired by set, the second is .5 ± .02 above the first, although the FID of each varies by .3."""
    code, output = compared()

    assert code == 0
    assert output.splitlines()[0] == "fid        +0.5 ± 0.0248, differs"
    assert "kid        +0 ± 0, no difference beyond the interval" in output
    assert "fid_dense  +0.5 ± 0.0248, differs" in output


def test_different_protocols_are_refused(compared):
    """One line names the field that differs."""
    code, output = compared({"seed": 9})

    assert code == 1
    assert "seed is 3 and 9; measure both under one protocol" in output
    assert len(output.splitlines()) == 1


def test_ssim_is_left_out_for_different_dense_models(compared):
    """So is FID to dense; FID is still compared."""
    code, output = compared(dense="b")

    assert code == 0
    assert "fid" in output
    assert "ssim" not in output
    assert "fid_dense" not in output


def test_what_an_older_evaluation_lacks_is_left_out(compared):
    """The other metrics are compared."""
    code, output = compared(has_fid_dense=False)

    assert code == 0
    assert [line.split()[0] for line in output.splitlines()] == ["fid", "kid", "precision", "recall", "ssim", "mse"]


def test_different_packages_give_a_warning(compared):
    """The protocol does not contain versions of packages."""
    _, output = compared(packages={"torch": "3"})

    assert "were measured with different packages" in output


def test_an_unknown_model_is_refused(compared):
    """The error lists the models that the folder holds."""
    code, output = compared(arguments=("--model", "finetund"))

    assert code == 1
    assert "holds no model 'finetund'; choose one of dense, pruned" in output
