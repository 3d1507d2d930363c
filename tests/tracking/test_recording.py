"""The record in MLflow."""

import os

import pytest
import torch
from click.testing import CliRunner
from mlflow import MlflowClient

from stages.finetune.curve import CurvePoint
from stages.finetune.report import write_report
from stages.runtime.errors import InputError
from stages.storage.files import read_json, write_json
from stages.storage.provenance import write_run_record
from stages.storage.tensors import write_tensors
from stages.tracking.__main__ import main
from stages.tracking.compression import Compression
from stages.tracking.recording import record as record_in
from stages.tracking.recording import send_record


@pytest.fixture
def compression(tmp_path, params, magnitude, monkeypatch):
    """What the stages leave behind, in small; MLflow's store is in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    found = Compression(tmp_path / "artifacts", tmp_path / "reports")
    for stage in found.folders:
        block = {} if stage == "evaluate" else {stage: getattr(params, stage)}
        write_run_record(found.folders[stage], stage, seed=params.seed, **block)
    write_tensors(found.model / "unet" / "weights.safetensors", magnitude.saliency)
    curve = [CurvePoint(0, None, ((0.9, 0.5),)), CurvePoint(9, 0.2, ((0.9, 0.1),))]
    write_report(curve, {}, tmp_path / "reports" / "finetune")
    (tmp_path / "reports" / "importance").mkdir()
    (tmp_path / "reports" / "importance" / "losses.csv").write_text("timestep,loss\n0,2.5\n1,1.5\n")
    evaluated = tmp_path / "reports" / "evaluate"
    write_json(evaluated / "metrics" / "finetuned.json", {"protocol": "0123456789ab", "fid": 1.25})
    write_json(evaluated / "evaluation.json", {"protocol_id": "0123456789ab"})
    write_json(found.folders["costs"] / "costs.json", {"costs": [{"device": "a CPU"}]})
    return found


def record(compression):
    """Keep it beside its reports and send it."""
    return record_in(compression, compression.reports.parent / "unsent")


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
    curve = client.get_metric_history(run_id, "finetune.heldout_loss")
    assert [(point.step, point.value) for point in curve] == [(0, 0.5), (9, 0.1)]
    assert [point.step for point in client.get_metric_history(run_id, "finetune.train_loss")] == [9]
    assert [point.value for point in client.get_metric_history(run_id, "importance.loss")] == [2.5, 1.5]
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
    path = compression.folders["prune"] / "run.json"
    write_json(path, {**read_json(path), "git_commit": "f" * 40, "device": {"name": "another"}})

    assert compression.id() == first
    write_json(path, {**read_json(path), "code_sha256": "f" * 64})
    assert compression.id() != first


def waiting(unsent):
    """Name the records that wait."""
    return [path.name for path in unsent.iterdir() if path.name != ".lock"]


@pytest.mark.parametrize("call", ["log_batch", "log_artifacts", "set_terminated", "search_runs"])
def test_a_record_that_broke_off_is_written_again(compression, monkeypatch, call):
    """Wherever the server died, the record waits; sent again it is there once and whole, and no half run is left."""

    def break_off(*_, **__):
        raise ConnectionError("gone")

    unsent = compression.reports.parent / "unsent"
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, call, break_off)
        with pytest.raises(ConnectionError):
            record(compression)
    assert waiting(unsent) == [compression.id()]
    record(compression)

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("espalier").experiment_id])
    assert run.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "finetune.heldout_loss")] == [0, 9]
    assert not waiting(unsent)


def test_an_answer_that_was_lost_doubles_nothing(compression, monkeypatch):
    """The run was finished but the sender never heard of it: the next try finds it."""
    finish = MlflowClient.set_terminated

    def finish_and_die(*arguments):
        finish(*arguments)
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_terminated", finish_and_die)
        with pytest.raises(ConnectionError):
            record(compression)

    assert record(compression)[1] is False


def test_two_machines_at_once_leave_one_run(compression, monkeypatch):
    """Both found none and both wrote one: the one that was kept first stays, and is found from then on."""
    MlflowClient().create_experiment("espalier")
    other = []
    search = MlflowClient.search_runs

    def look(self, *arguments, **options):
        if not other:  # the other machine writes its run between our look and our own run
            other.append(None)
            record_in(compression, compression.reports.parent / "elsewhere")
            return []
        return search(self, *arguments, **options)

    monkeypatch.setattr(MlflowClient, "search_runs", look)
    run_id, _ = record(compression)

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("espalier").experiment_id])
    assert run.info.run_id == run_id == record_in(compression, compression.reports.parent / "elsewhere")[0]


def test_a_server_that_is_away_does_not_stop_the_work(compression, monkeypatch):
    """With --allow-offline it is a warning that says how to record later, without it an error; never a traceback."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert compression
    lenient, strict = (CliRunner().invoke(main, options) for options in (["--allow-offline"], []))

    assert (lenient.exit_code, strict.exit_code) == (0, 75)  # EX_TEMPFAIL: another try makes sense
    for result in (lenient, strict):
        assert "or by: python -m stages.tracking" in result.output


def test_what_waits_goes_with_the_next_record(compression, monkeypatch):
    """Also when that is of another compression; reports changed since then were kept as they were."""
    server = os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    first, folder = compression.id(), compression.reports.parent
    monkeypatch.chdir(folder)
    CliRunner().invoke(main, ["--allow-offline"])
    write_tensors(compression.model / "unet" / "weights.safetensors", {"other": torch.ones(1)})
    write_json(compression.reports / "evaluate" / "metrics" / "finetuned.json", {"protocol": "0123456789ab", "fid": 7})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    result = CliRunner().invoke(main, [])

    client = MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("espalier").experiment_id])
    fids = {run.data.tags["espalier.compression"]: run.data.metrics["evaluate.finetuned.fid"] for run in runs}
    assert result.output.count("recorded") == 2
    assert fids == {first: 1.25, compression.id(): 7}
    assert not waiting(folder / "unsent")


def test_a_damaged_record_that_waits_is_named(compression):
    """One line says which, and nothing of it is sent."""
    folder = compression.reports.parent / "unsent" / ("0" * 64)
    write_json(folder / "record.json", {"compression": "../../etc"})

    with pytest.raises(InputError, match=r"record\.json is damaged"):
        send_record(folder)


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_damaged_record_is_no_fault_of_the_server(compression, text):
    """--allow-offline does not hide it."""
    (compression.folders["prune"] / "run.json").write_text(text)

    with pytest.raises(InputError, match=r"run\.json is not"):
        record(compression)


@pytest.mark.parametrize("change", [{"params": []}, {"params": {}}, {"params": {"importance": {"criterion": {}}}}])
def test_a_record_of_another_shape_is_one_line(compression, tmp_path, change):
    """Whatever somebody wrote into it, and nothing is kept."""
    path = compression.folders["evaluate"] / "run.json"
    write_json(path, {**read_json(path), **change})
    importance = compression.folders["importance"] / "run.json"
    write_json(importance, {**read_json(importance), **({"params": {}} if change == {"params": {}} else {})})
    if change.get("params", 1) == {"importance": {"criterion": {}}}:
        (compression.reports / "finetune" / "curve.csv").write_text("step,loss\n1,2,3\n")

    with pytest.raises(InputError, match="is not what its stage wrote"):
        record(compression)
    assert not (tmp_path / "unsent").exists() or not waiting(tmp_path / "unsent")


def test_reports_that_cannot_be_copied_are_told(compression, tmp_path):
    """A link into nothing, say; nothing is kept by halves."""
    (compression.reports / "link").symlink_to(tmp_path / "nothing")

    with pytest.raises(InputError, match="cannot be kept in"):
        record(compression)
    assert not waiting(tmp_path / "unsent")


def test_without_a_finished_compression_there_is_nothing_to_record(tmp_path):
    """Also with --allow-offline: this is no fault of a server."""
    with pytest.raises(InputError, match="run the pipeline first"):
        record(Compression(tmp_path / "artifacts", tmp_path / "reports"))
    assert not (tmp_path / "unsent").exists()
