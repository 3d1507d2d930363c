"""Live logging of a training to MLflow."""

import socket
import subprocess
import sys

import pytest
from mlflow import MlflowClient

from stages.finetune.curve import CurvePoint
from stages.finetune.engine import Engine
from stages.finetune.interrupt import StoppedError
from stages.finetune.recovery import live_logging
from stages.runtime.errors import MAX_LENGTH, InputError
from stages.tracking.live import EXPERIMENT, TAG

RUN = "e" * 64


@pytest.fixture
def server(mlflow_database):
    """A client of an MLflow database of the test's own, which the environment names."""
    return MlflowClient(mlflow_database)


@pytest.fixture
def train(params, unet):
    """Return a function that logs a training of one row, which `error` ends."""

    def run_training(step=5, error=None):
        engine = Engine(params.finetune.engine, unet.device)
        with live_logging(RUN, params.finetune, engine) as callback:
            callback(CurvePoint(step, 0.5, ((0.9, 0.4), (0.99, 0.3))), None)
            if error:
                raise error

    return run_training


def runs(client):
    """Return the runs on the server."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return client.search_runs([experiment.experiment_id])


def test_a_run_holds_the_curve_and_a_resumed_training_continues_it(server, train):
    """Metrics have the names of curve.csv; params and the final status are logged."""
    with pytest.raises(StoppedError):
        train(5, StoppedError(15, 5))
    (run,) = runs(server)
    assert (run.info.status, run.data.tags[TAG]) == ("KILLED", RUN)
    assert run.data.params["loss.output"] == "1.0"
    train(10)
    (run,) = runs(server)

    assert run.info.status == "FINISHED"
    history = server.get_metric_history(run.info.run_id, "heldout_loss")
    assert [(point.step, point.value) for point in history] == [(5, 0.3), (10, 0.3)]
    assert run.data.metrics["heldout_ema_0.9"] == 0.4


def test_samples_are_logged_as_artifacts(server, params, unet, images):
    """The file name holds the step."""
    with live_logging(RUN, params.finetune, Engine(params.finetune.engine, unet.device)) as callback:
        callback(CurvePoint(4, None, ((0.9, 0.4),)), images.train[:3])
    (run,) = runs(server)

    assert [file.path for file in server.list_artifacts(run.info.run_id, "samples")] == ["samples/step-00000004.png"]


def test_an_unreachable_server_gives_one_warning(train, monkeypatch, capsys):
    """The training continues."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    train()

    assert capsys.readouterr().err.count("Warning: MLflow does not show this training") == 1


@pytest.mark.parametrize("address", ["127.0.0.1:5000", "htp://host", "http://me:a@b@host", "http://host:x"])
def test_a_wrong_address_ends_a_training_before_its_first_step(train, monkeypatch, address):
    """It is a mistake, unlike a server that is away."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)

    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI") as caught:
        train(error=AssertionError("the training began"))
    assert caught.value.exit_code == 1


def test_the_warning_is_one_line(train, monkeypatch, capsys, page_server):
    """Whatever answers at the address."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", page_server(404, "\x1b[2Jno\rsuch\nhere" + 400 * "x"))
    train()
    (line,) = capsys.readouterr().err.split("\n")[:-1]

    assert line.startswith("Warning: MLflow does not show this training")
    assert line.isprintable()
    assert len(line) <= MAX_LENGTH + len("Warning: ")
    assert line.endswith("; the training continues without it")


HANGING = """
from stages.tracking import live
live.PATIENCE_S = 0.5
run = live.LiveRun("e" * 64, {})
run.log(1, {"loss": 0.5})
run.close("FINISHED")
"""


def test_a_server_that_never_answers_does_not_delay_the_exit(root, monkeypatch):
    """The end of a training waits PATIENCE_S and warns once; the pending request does not keep the process alive."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        command = [sys.executable, "-c", HANGING]
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=60)

    assert result.stderr.count("Warning: MLflow does not show this training") == 1


def test_nothing_is_logged_without_a_server(train, monkeypatch, tmp_path):
    """No local file is written either."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    train()

    assert list(tmp_path.iterdir()) == []
