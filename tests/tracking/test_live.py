"""A training that can be watched."""

import pytest
from mlflow import MlflowClient

from stages.finetune.curve import CurvePoint
from stages.finetune.engine import Engine
from stages.finetune.interrupt import StoppedError
from stages.finetune.recovery import watched
from stages.tracking.live import EXPERIMENT, TAG

RUN = "e" * 64


@pytest.fixture
def server(tmp_path, monkeypatch):
    """MLflow on a file of the test's own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture
def watch(params, unet):
    """Watch a training of one row; `error` ends it."""

    def act(step=5, error=None):
        engine = Engine(params.finetune.engine, unet.device)
        with watched(RUN, params.finetune, engine) as listener:
            listener(CurvePoint(step, 0.5, ((0.9, 0.4), (0.99, 0.3))), None)
            if error:
                raise error

    return act


def runs(client):
    """Find what the server shows."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return client.search_runs([experiment.experiment_id])


def test_the_curve_is_there_while_the_training_runs(server, watch):
    """Numbers under the names of curve.csv, params, and how it ended; a second start goes on in the same run."""
    with pytest.raises(StoppedError):
        watch(5, StoppedError(15, 5))
    (run,) = runs(server)
    assert (run.info.status, run.data.tags[TAG]) == ("KILLED", RUN)
    assert run.data.params["loss.output"] == "1.0"
    watch(10)
    (run,) = runs(server)

    assert run.info.status == "FINISHED"
    history = server.get_metric_history(run.info.run_id, "heldout_loss")
    assert [(point.step, point.value) for point in history] == [(5, 0.3), (10, 0.3)]
    assert run.data.metrics["heldout_ema_0.9"] == 0.4


def test_pictures_are_shown(server, params, unet, images):
    """As an artifact, named by the step."""
    with watched(RUN, params.finetune, Engine(params.finetune.engine, unet.device)) as listener:
        listener(CurvePoint(4, None, ((0.9, 0.4),)), images.train[:3])
    (run,) = runs(server)

    assert [file.path for file in server.list_artifacts(run.info.run_id, "samples")] == ["samples/step-00000004.png"]


def test_a_server_that_is_away_is_told_of_once(watch, monkeypatch, capsys):
    """And the training goes on."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    watch()

    assert capsys.readouterr().err.count("Warning: MLflow does not show this training") == 1


def test_nothing_is_sent_where_no_server_is_named(watch, monkeypatch, tmp_path):
    """Not even to a file."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    watch()

    assert list(tmp_path.iterdir()) == []
