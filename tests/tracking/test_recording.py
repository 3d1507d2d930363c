"""The record of a compression in MLflow."""

import errno
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from stages.finetune.curve import CurvePoint
from stages.finetune.report import write_report
from stages.runtime.errors import InputError, UnavailableError
from stages.storage.files import folder_sha256, read_json, write_json
from stages.storage.provenance import write_run_record
from stages.storage.tensors import write_tensors
from stages.tracking.__main__ import main
from stages.tracking.compression import Compression
from stages.tracking.recording import (
    _make_record,
    _send_records,
    list_reports,
    record_compression,
    record_folder,
    save_record,
    send_record,
)

DATASET = {"sha256": "d" * 64, "train": 9, "source": {"source": "folder", "path": "/home/me/cats", "classes": None}}


@pytest.fixture
def compression(tmp_path, params, magnitude, monkeypatch, mlflow_database):  # noqa: ARG001  # in the environment
    """Small outputs of all stages; MLflow's store is in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    made = Compression(tmp_path / "artifacts", tmp_path / "reports")
    for stage in made.folders:
        write_json(made.code / f"{stage}.json", {"sha256": stage})
        block = {} if stage == "evaluate" else {stage: getattr(params, stage)}
        write_run_record(made.folders[stage], stage, seed=params.seed, **block)
    write_tensors(made.model / "unet" / "weights.safetensors", magnitude.saliency)
    curve = [CurvePoint(0, None, ((0.9, 0.5),)), CurvePoint(9, 0.2, ((0.9, 0.1),))]
    write_report(curve, {}, tmp_path / "reports" / "finetune")
    (tmp_path / "reports" / "importance").mkdir()
    (tmp_path / "reports" / "importance" / "losses.csv").write_text("timestep,loss\n0,2.5\n1,1.5\n")
    evaluated = tmp_path / "reports" / "evaluate"
    write_json(evaluated / "metrics" / "finetuned.json", {"protocol": "0123456789ab", "fid": 1.25})
    write_json(evaluated / "evaluation.json", {"protocol_id": "0123456789ab"})
    write_json(made.folders["costs"] / "costs.json", {"costs": [{"device": "a CPU"}]})
    return made


def record(compression):
    """Save a record beside the reports and send it."""
    return record_compression(compression, compression.reports.parent / "unsent")


def test_one_compression_is_one_run(compression):
    """It holds params, metrics, curves and reports; a second call finds the same run."""
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


def test_a_run_is_shown_as_what_it_is(compression, tmp_path):
    """Name, description with table and picture, images, and the times of the work; no folder of this machine."""
    write_json(tmp_path / "artifacts" / "data" / "dataset.json", DATASET)
    evaluation = {"protocol_id": "0123456789ab", "protocol": {"real_sha256": "e" * 64, "num_real_images": 7}}
    write_json(tmp_path / "reports" / "evaluate" / "evaluation.json", evaluation)
    (tmp_path / "reports" / "summary").mkdir()
    (tmp_path / "reports" / "summary" / "summary.png").write_bytes(b"png")
    for stage, day, seconds in (("fetch", 1, 10), ("prune", 3, 5)):
        folder = compression.folders[stage]
        found = {"output_sha256": folder_sha256(folder), "device": {}, "seconds": seconds}
        found["began_at"] = f"2026-01-0{day}T00:00:00+00:00"
        write_json(folder.with_name(f"{folder.name}.provenance.json"), found)
    run_id, _ = record(compression)
    run = MlflowClient().get_run(run_id)

    assert run.info.run_name == "digits · diff-pruning · ratio 0.3 · compensated"
    assert (run.info.end_time - run.info.start_time, run.info.end_time) == (15_000, 1767398405000)
    assert (
        "FID 1.25.\n\n![samples of each model from the same noise](get-artifact?path=reports%2Fsummary"
        in (run.data.tags["mlflow.note.content"])
    )
    assert f"run_uuid={run_id}" in run.data.tags["mlflow.note.content"]
    used = {it.tags[0].value: it.dataset for it in run.inputs.dataset_inputs}
    assert {key: (it.name, it.digest) for key, it in used.items()} == {
        "calibration and recovery": ("cats", "d" * 16),
        "real images": ("cats", "e" * 16),
    }
    assert not [text for text in [*run.data.tags.values(), *run.data.params.values()] if str(tmp_path) in text]
    assert "/home/me" not in str(run.to_dictionary())


def test_other_weights_are_another_compression(compression):
    """The id is a hash of the content."""
    first, _ = record(compression)
    write_tensors(compression.model / "unet" / "weights.safetensors", {"other": torch.ones(1)})
    second, new = record(compression)

    assert new
    assert first != second


def test_times_of_other_params_or_another_device_are_another_compression(compression):
    """Of those of equal params on the same device the first are recorded."""
    ids, costs = [compression.id()], compression.folders["costs"]
    timed, ran = read_json(costs / "costs.json"), read_json(costs / "run.json")
    rows = timed["costs"]
    for changes in ({"latency_ms": 77.0}, {"device": "another"}):
        write_json(costs / "costs.json", {**timed, "costs": [{**row, **changes} for row in rows]})
        ids.append(compression.id())
    write_json(costs / "run.json", {**ran, "params": {"costs": {"deterministic": False}}})
    ids.append(compression.id())

    assert ids[0] == ids[1]
    assert len(set(ids[1:])) == 3


def test_a_commit_or_the_device_of_another_stage_does_not_change_the_id(compression):
    """Equal params, code and weights are the same compression; other code is not."""
    first = compression.id()
    path = compression.folders["prune"] / "run.json"
    write_json(path, {**read_json(path), "git_commit": "f" * 40, "device": {"name": "another"}})

    assert compression.id() == first
    write_json(compression.code / "prune.json", {"sha256": "f" * 64})
    assert compression.id() != first


def waiting(unsent):
    """List the names of the saved records."""
    return [path.name for path in unsent.iterdir() if path.name != ".lock"]


@pytest.mark.parametrize("call", ["log_batch", "log_artifacts", "set_terminated", "search_runs"])
def test_an_interrupted_record_is_sent_again(compression, monkeypatch, call):
    """Whichever request fails, the record stays saved; the next call leaves one complete run and no unfinished one."""

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


def test_a_lost_answer_creates_no_second_run(compression, monkeypatch):
    """The server finished the run, but its answer was lost: the next call finds it."""
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
    """Both found no run and created one: the record that was saved first remains."""
    MlflowClient().create_experiment("espalier")
    other = []
    search = MlflowClient.search_runs

    def search_late(self, *arguments, **options):
        if not other:  # the other machine creates its run after this search
            other.append(None)
            record_compression(compression, compression.reports.parent / "elsewhere")
            return []
        return search(self, *arguments, **options)

    monkeypatch.setattr(MlflowClient, "search_runs", search_late)
    run_id, _ = record(compression)

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("espalier").experiment_id])
    assert run.info.run_id == run_id == record_compression(compression, compression.reports.parent / "elsewhere")[0]


@pytest.mark.parametrize(("status", "code"), [(200, 1), (404, 1), (500, 75), (503, 75)])
def test_a_wrong_server_is_no_outage(compression, monkeypatch, page_server, status, code):
    """A page of another program is a mistake, and an error of a server an outage; the record is kept in both cases."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", page_server(status, "<html>"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    result = CliRunner().invoke(main, [])

    assert compression
    assert result.exit_code == code, result.output
    assert len(result.stderr.splitlines()) == 1
    assert list(Path("unsent").glob("*/record.json"))


def test_a_file_that_is_no_database_is_a_mistake(compression, monkeypatch, tmp_path):
    """A later attempt would fail as well."""
    (tmp_path / "text.db").write_text("no database " * 400)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/text.db")
    result = CliRunner().invoke(main, [])

    assert compression
    assert result.exit_code == 1, result.output
    assert "correct MLFLOW_TRACKING_URI" in result.stderr.splitlines()[-1]


def test_an_unavailable_server_is_a_warning_with_allow_offline(compression, monkeypatch):
    """Without it an error; both name the command that records later, and neither prints a traceback."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert compression
    lenient, strict = (CliRunner().invoke(main, options) for options in (["--allow-offline"], []))

    assert (lenient.exit_code, strict.exit_code) == (0, 75)  # EX_TEMPFAIL: a retry may succeed
    for result in (lenient, strict):
        assert "or by: python -m stages.tracking" in result.output


def test_saved_records_are_sent_with_the_next_one(compression, monkeypatch):
    """Also with that of another compression; a saved record holds the reports of its own time."""
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


def test_a_damaged_saved_record_is_named(compression):
    """It is not sent."""
    folder = compression.reports.parent / "unsent" / ("0" * 64)
    write_json(folder / "record.json", {"compression": "../../etc"})

    with pytest.raises(InputError, match=r"record\.json is damaged"):
        send_record(folder)


@pytest.mark.parametrize("damage", ["text", "reports"])
def test_another_damaged_record_does_not_stop_the_latest(compression, damage):
    """The compression's own run is stored, a warning names the other record, and that one stays."""
    other = compression.reports.parent / "unsent" / ("0" * 64)
    saved = save_record(_make_record(compression), compression.reports, other.parent)
    content = read_json(saved / "record.json")
    saved.rename(other)
    write_json(other / "record.json", {} if damage == "text" else {**content, "compression": other.name})
    if damage == "reports":
        shutil.rmtree(other / "reports")
    result = CliRunner().invoke(main, [])

    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(": recorded\n")
    assert result.stderr.startswith("Warning: ")
    assert f"remove {other.relative_to(Path.cwd())} and record again" in result.stderr
    assert waiting(other.parent) == [other.name]


def test_a_record_that_the_server_refuses_does_not_stop_the_others(compression, monkeypatch, capsys):
    """Neither the latest nor one behind it; a warning names the folder, which stays."""
    unsent = compression.reports.parent / "unsent"
    latest, bad, good = (unsent / name for name in ("latest", "bad", "good"))

    def send(folder):
        if folder == bad:
            raise MlflowException("no room")
        return folder.name, True

    monkeypatch.setattr("stages.tracking.recording.send_record", send)

    assert _send_records(latest, [bad, good], allow_offline=False) == ("latest", True)
    output = capsys.readouterr()
    assert f"did not store the record in {bad}" in output.err
    assert output.out.splitlines() == ["MLflow run latest: recorded", "MLflow run good: recorded"]


@pytest.mark.usefixtures("compression")
def test_a_folder_whose_upload_fails_leaves_one_run(tmp_path, monkeypatch):
    """The next attempt deletes the unfinished run of the one before."""
    (tmp_path / "table").mkdir()
    (tmp_path / "table/a.md").write_text("a")

    def refuse(*_):
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifacts", refuse)
        for _ in range(2):
            with pytest.raises(UnavailableError, match="failed to record name"):
                record_folder("name", "c" * 64, {}, tmp_path / "table", [{"a": 1}])
    run_id = record_folder("name", "c" * 64, {}, tmp_path / "table", [{"a": 1}])

    client = MlflowClient()
    runs = client.search_runs([client.get_experiment_by_name("espalier").experiment_id])
    assert [(run.info.run_id, run.info.status) for run in runs] == [(run_id, "FINISHED")]


@pytest.mark.parametrize("name", [".{}.sent", ".{}.old.sent"])
def test_what_a_kill_left_of_a_sent_record_does_not_stop_it(compression, name):
    """A removal that was interrupted leaves a folder that is not empty: the same record is sent again and removed."""
    unsent = compression.reports.parent / "unsent"
    write_json(unsent / name.format(compression.id()) / "reports" / "left.json", {})
    run_id, new = record(compression)

    assert new
    assert MlflowClient().get_run(run_id).info.status == "FINISHED"
    assert not waiting(unsent)


def test_a_run_that_another_machine_finished_meanwhile_stays(compression, monkeypatch):
    """It may be registered by now, even if its work began later."""
    folder = save_record(_make_record(compression), compression.reports, compression.reports.parent / "unsent")
    upload, others = MlflowClient.log_artifacts, []

    def wait(client, *arguments):
        """Upload slowly: another machine is quicker."""
        monkeypatch.setattr(MlflowClient, "log_artifacts", upload)
        shutil.copytree(folder, other := folder.parents[1] / "elsewhere" / folder.name)
        path = other / "record.json"
        write_json(path, {**read_json(path), "started_ms": read_json(path)["finished_ms"]})
        others.append(send_record(other)[0])
        upload(client, *arguments)

    monkeypatch.setattr(MlflowClient, "log_artifacts", wait)
    run_id, _ = send_record(folder)

    assert [run_id] == others
    assert MlflowClient().get_run(run_id).info.lifecycle_stage == "active"


def test_a_sent_record_that_cannot_be_removed_is_a_warning(compression, monkeypatch, capsys):
    """Its run is stored; the warning names what to remove."""
    folder = save_record(_make_record(compression), compression.reports, compression.reports.parent / "unsent")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)  # the tests may run as a user whom nothing is denied
    run_id, new = send_record(folder)

    assert new
    assert MlflowClient().get_run(run_id).info.status == "FINISHED"
    warning = f"Warning: {folder} was sent and cannot be removed ([Errno 13] Permission denied); remove it\n"
    assert capsys.readouterr().err == warning


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_damaged_run_record_is_an_input_error(compression, text):
    """It is not an error of the server, which --allow-offline would hide."""
    (compression.folders["prune"] / "run.json").write_text(text)

    with pytest.raises(InputError, match=r"run\.json is not"):
        record(compression)


@pytest.mark.parametrize("change", [{"params": []}, {"params": {}}, {"params": {"importance": {"criterion": {}}}}])
def test_a_run_record_of_another_shape_is_one_line(compression, tmp_path, change):
    """No record is saved."""
    path = compression.folders["evaluate"] / "run.json"
    write_json(path, {**read_json(path), **change})
    importance = compression.folders["importance"] / "run.json"
    write_json(importance, {**read_json(importance), **({"params": {}} if change == {"params": {}} else {})})
    if change.get("params", 1) == {"importance": {"criterion": {}}}:
        (compression.reports / "finetune" / "curve.csv").write_text("step,loss\n1,2,3\n")

    with pytest.raises(InputError, match="is not what its stage wrote"):
        record(compression)
    assert not (tmp_path / "unsent").exists() or not waiting(tmp_path / "unsent")


def test_reports_that_cannot_be_copied_are_one_line(compression, tmp_path):
    """For example a broken link; no incomplete record is saved."""
    (compression.reports / "link").symlink_to(tmp_path / "nothing")

    with pytest.raises(InputError, match="cannot be copied to"):
        record(compression)
    assert not waiting(tmp_path / "unsent")


def test_an_unfinished_compression_is_an_input_error(tmp_path):
    """No record is saved."""
    with pytest.raises(InputError, match="run the pipeline first"):
        record(Compression(tmp_path / "artifacts", tmp_path / "reports"))
    assert not (tmp_path / "unsent").exists()


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_user_is_a_mistake(compression, monkeypatch, status):
    """A server that refuses the user is not away: exit code 1 names the variables, and the record stays saved."""

    class Refuse(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"You are not authenticated.")

        do_POST = do_GET  # noqa: N815  # the name that http.server calls

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        folder = compression.reports.parent
        result = CliRunner().invoke(
            main,
            [
                "--artifacts",
                str(folder / "artifacts"),
                "--reports",
                str(folder / "reports"),
                "--unsent",
                str(folder / "unsent"),
            ],
        )
        server.shutdown()

    assert result.exit_code == 1
    assert "correct MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in result.stderr
    assert waiting(folder / "unsent") == [compression.id()]


def test_reports_are_listed_by_their_paths(compression):
    """At the top and in folders; what the run lacks is left out, also where its folder is missing."""
    write_json(compression.reports / "finetune.provenance.json", {})
    run_id, _ = record(compression)
    names = ["finetune.provenance.json", "evaluate/evaluation.json", "variants/variants.json", "metrics.json"]

    assert list_reports(run_id, names) == names[:2]
    assert list_reports(run_id, []) == []
