"""A comparison as a flow, on a real Prefect server and a real MLflow: resumed, and with a cell that fails."""

import json

import pytest
from mlflow import MlflowClient
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.compare import compare
from flows.tasks import runners
from flows.tasks.outcome import Outcome
from flows.tasks.stages import StageFailedError
from stages.params import load_params
from stages.storage.files import write_json
from stages.tracking.recording import TABLE, record_folder
from tests.flows.test_method_rows import repository
from tests.records import make_costs
from tests.tools.test_method_table import make_record

__all__ = ["repository"]
ROWS = ["random", "diff-pruning-0.05", "ours"]
ODD = "Error: the disk is full; ran prune; MLflow run x"


@pytest.fixture
def compress(protocol, tmp_path, monkeypatch):
    """Replace minutes of computing in a workspace by an evaluation in MLflow, or by a failure."""
    compressed, broken = [], set()

    def compress_at(workspace, _limits, label, *, to_register):
        label = label.removesuffix(": ")
        compressed.append(label)
        if label in broken:
            raise StageFailedError(ODD)
        params = load_params(workspace.path / "params.yaml")
        drawn = protocol.model_copy(update={"seed": params.seed})
        record = make_record(drawn, 1 + params.seed + len(params.finetune.ema_decays) / 10, 0.5)
        folder = tmp_path / "recorded" / label
        write_json(folder / "reports" / "evaluate" / "evaluation.json", record.model_dump(mode="json"))
        write_json(folder / "reports" / "costs" / "costs.json", make_costs(record).model_dump(mode="json"))
        run_id = record_folder(label, label, {}, folder, [{"registered": to_register}])
        return Outcome(ran=("prune",), mlflow_run=run_id)

    monkeypatch.setattr(runners, "compress_at", compress_at)
    return compressed, broken


@pytest.fixture
def run(prefect_server, repository):
    """Run a comparison of three rows with two seeds: its state, and the table as data."""

    def do():
        settings = {PREFECT_API_URL: prefect_server.uri, PREFECT_API_AUTH_STRING: prefect_server.auth}
        with temporary_settings(settings):
            state = compare("digits", [0, 1], ROWS, ablation=False, return_state=True)
        (folder,) = (repository.root / "comparisons").glob("*/result")
        return state, json.loads((folder / "method_table.json").read_text())

    return do


@pytest.mark.e2e
def test_a_failed_cell_is_reported_and_repeated(run, compress):
    """The others are compared; the next run compresses it alone, and MLflow keeps one run of the comparison."""
    compressed, broken = compress
    broken.add("ours, seed 1")
    state, found = run()

    assert state.is_failed()
    assert state.message == f"5 of 6 cells finished; ours, seed 1 failed: {ODD}"
    assert len(compressed) == len(set(compressed)) == 6
    assert [row[-1] for row in found["rows"]] == ["2", "2", "2", "1"]

    compressed.clear()
    broken.clear()
    state, found = run()

    assert (state.is_completed(), compressed) == (True, ["ours, seed 1"])
    assert [row[-1] for row in found["rows"]] == ["2", "2", "2", "2"]
    assert found["methods"]["ours"]["fid_difference"]["mean"] == pytest.approx(0.2)
    assert found["command"].startswith("espalier compare --preset digits --commit ")
    client = MlflowClient()
    experiment = client.get_experiment_by_name("espalier").experiment_id
    (kept,) = [it for it in client.search_runs([experiment]) if it.info.run_name.startswith("comparison-")]
    table = client.load_table(experiment, TABLE, [kept.info.run_id])
    assert list(table["method"]) == ["pretrained", "random", "diff-pruning T = .05", "ours"]
    assert list(table["seeds"].astype(str)) == ["2"] * 4
