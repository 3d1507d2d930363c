"""The record in MLflow."""

import pytest
import torch
from click.testing import CliRunner
from mlflow import MlflowClient

from stages.artifacts import read_json, write_json, write_tensors
from stages.errors import InputError
from stages.finetune.checkpoint import CurvePoint
from stages.finetune.report import write_report
from stages.provenance import write_run_record
from stages.tracking import Compression, main, record


@pytest.fixture
def compression(tmp_path, params, magnitude, monkeypatch):
    """What the stages leave behind, in small; MLflow's store is in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    found = Compression(tmp_path / "artifacts", tmp_path / "reports")
    for stage in found.homes:
        write_run_record(found.homes[stage], stage, seed=params.seed, **{stage: getattr(params, stage)})
    write_tensors(found.model / "unet" / "weights.safetensors", magnitude.saliency)
    write_report([CurvePoint(0, None, 0.5), CurvePoint(9, 0.2, 0.1)], tmp_path / "reports" / "finetune")
    (tmp_path / "reports" / "importance").mkdir()
    (tmp_path / "reports" / "importance" / "losses.csv").write_text("timestep,loss\n0,2.5\n1,1.5\n")
    evaluated = tmp_path / "reports" / "evaluate"
    write_json(evaluated / "metrics" / "finetuned.json", {"protocol": "0123456789ab", "fid": 1.25})
    write_json(evaluated / "evaluation.json", {"protocol_id": "0123456789ab"})
    write_tensors(found.released / "unet" / "weights.safetensors", magnitude.saliency)
    (found.released / "README.md").write_text("# A card")
    return found


def test_one_compression_is_one_run(compression):
    """Params, metrics, curves, pictures and model are in it, and a second call finds it instead of writing another."""
    run_id, new = record(compression)
    again, new_again = record(compression)

    assert (new, new_again, again) == (True, False, run_id)
    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("espalier").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["prune.target.ratio"] == "0.3"
    assert run.data.params["fetch.model.name"] == "digits"
    assert run.data.metrics["evaluate.finetuned.fid"] == 1.25
    assert run.data.tags["espalier.protocol"] == "0123456789ab"
    assert "model/README.md" in [file.path for file in client.list_artifacts(run_id, "model")]
    curve = client.get_metric_history(run_id, "finetune.heldout_loss")
    assert [(point.step, point.value) for point in curve] == [(0, 0.5), (9, 0.1)]
    assert [point.step for point in client.get_metric_history(run_id, "finetune.train_loss")] == [9]
    assert [point.value for point in client.get_metric_history(run_id, "importance.loss")] == [2.5, 1.5]
    assert [file.path for file in client.list_artifacts(run_id, "model/unet")] == ["model/unet/weights.safetensors"]
    assert "reports/evaluate" in [file.path for file in client.list_artifacts(run_id, "reports")]


def test_other_weights_are_another_compression(compression):
    """The content decides, not the moment."""
    first, _ = record(compression)
    write_tensors(compression.model / "unet" / "weights.safetensors", {"other": torch.ones(1)})
    second, new = record(compression)

    assert new
    assert first != second


def test_where_and_when_it_ran_is_not_what_it_is(compression):
    """The same params, code and weights at another commit or on another machine are the same compression."""
    first = compression.id()
    path = compression.homes["prune"] / "run.json"
    write_json(path, {**read_json(path), "git_commit": "f" * 40, "device": {"name": "another"}})

    assert compression.id() == first
    write_json(path, {**read_json(path), "code_sha256": "f" * 64})
    assert compression.id() != first


def test_a_record_that_broke_off_is_written_again(compression, monkeypatch):
    """The half run is marked as failed and does not count."""

    def break_off(*_):
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifacts", break_off)
        with pytest.raises(ConnectionError):
            record(compression)
    _, new = record(compression)

    client = MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("espalier").experiment_id])
    assert new
    assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED"]


def test_a_server_that_is_away_does_not_stop_the_work(compression, monkeypatch):
    """With --allow-offline it is a warning that says how to record later, without it an error; never a traceback."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert compression
    lenient, strict = (CliRunner().invoke(main, options) for options in (["--allow-offline"], []))

    assert (lenient.exit_code, strict.exit_code) == (0, 1)
    for result in (lenient, strict):
        assert "record it later with: python -m stages.tracking" in result.output


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_damaged_record_is_no_fault_of_the_server(compression, text):
    """--allow-offline does not hide it."""
    (compression.homes["prune"] / "run.json").write_text(text)

    with pytest.raises(InputError, match=r"run\.json is not"):
        record(compression)


def test_without_a_finished_compression_there_is_nothing_to_record(tmp_path):
    """Also with --allow-offline: this is no fault of a server."""
    with pytest.raises(InputError, match="run the pipeline first"):
        record(Compression(tmp_path / "artifacts", tmp_path / "reports"))
