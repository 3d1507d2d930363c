"""What recovery costs as a flow, on a real Prefect server and a real MLflow: each cell is finished once."""

import json

import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.curve import curve
from flows.tasks import runners
from flows.tasks.outcome import Outcome
from stages.params import load_params
from stages.storage.files import write_json
from stages.tracking.recording import record_folder
from tests.flows.test_method_rows import repository
from tests.records import make_costs, make_evaluation
from tests.tools.test_sweep_table import DENSE_MACS, make_point

__all__ = ["repository"]
ROWS, UNTIMED = ["noise", "mine"], "mine, seed 1"


@pytest.fixture
def compressed(protocol, tmp_path, monkeypatch):
    """Replace minutes of computing in a workspace by reports in MLflow; returns the labels of the cells."""
    labels = []

    def compress_at(workspace, _limits, label, *, to_register):
        label = label.removesuffix(": ")
        labels.append(label)
        params = load_params(workspace.path / "params.yaml")
        finetune, drawn = params.finetune, protocol.model_copy(update={"seed": params.seed})
        dense, names = make_point(DENSE_MACS, 0.5), [f"step-{step}" for step in finetune.snapshots]
        models = {name: make_point(500_000, 1 + params.seed) for name in ("pruned", "finetuned")}
        record = make_evaluation(drawn, {"dense": dense, **models})
        kept = make_evaluation(drawn, {"dense": dense, **dict.fromkeys(names, make_point(500_000, 2.0))})
        folder = tmp_path / "recorded" / label
        write_json(folder / "reports" / "evaluate" / "evaluation.json", record.model_dump(mode="json"))
        write_json(folder / "reports" / "evaluate" / "snapshots.json", kept.model_dump(mode="json"))
        write_json(folder / "reports" / "costs" / "costs.json", make_costs(record).model_dump(mode="json"))
        seconds = {str(step): step / 2 for step in (*finetune.snapshots, finetune.steps)}
        cost = {"cost": {"seconds_by_step": seconds, "alone": True, "machine": "cpu, 2 threads"}}
        if label != UNTIMED:
            write_json(folder / "reports" / "finetune.provenance.json", cost)
        return Outcome(ran=("prune",), mlflow_run=record_folder(label, label, {}, folder, [{"new": to_register}]))

    monkeypatch.setattr(runners, "compress_at", compress_at)
    return labels


@pytest.mark.e2e
def test_each_cell_is_trained_once_and_measured_at_every_step(prefect_server, repository, compressed):
    """A second run repeats nothing; a cell without times stays in the curve over steps."""
    given = {"steps": [10, 20], "recipes": {"mine": {"finetune.loss.output": 2}}, "return_state": True}
    with temporary_settings({PREFECT_API_URL: prefect_server.uri, PREFECT_API_AUTH_STRING: prefect_server.auth}):
        state = curve("digits", [0, 1], ROWS, **given)
        (folder,) = (repository.root / "curves").glob("*/result")
        found = json.loads((folder / "curve_table.json").read_text())
        again = curve("digits", [0, 1], ROWS, **given)

    assert (state.is_completed(), again.is_completed()) == (True, True)
    assert sorted(compressed) == ["mine, seed 0", UNTIMED, "noise, seed 0", "noise, seed 1"]
    assert set(found["curves"]) == set(ROWS)
    assert found["curves"]["mine"]["20"]["fid"]["mean"] == 1.5
    assert found["curves"]["mine"]["10"]["seconds"] == {"mean": 5.0, "half_width": None}
    assert "1 of 4 trainings are left out" in (folder / "table.md").read_text()
    assert found["command"].startswith("espalier compare --curve --preset digits --commit ")
    assert found["command"].endswith("--steps 10,20 --rows noise,mine --recipe 'mine={\"finetune.loss.output\": 2}'")
