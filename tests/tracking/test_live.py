"""Live logging of a training to MLflow."""

import socket
import subprocess
import sys
import threading
import time

import pytest
from mlflow import MlflowClient

from stages.finetune.curve import CurvePoint
from stages.finetune.engine import Engine
from stages.finetune.interrupt import StoppedError
from stages.finetune.recovery import live_logging
from stages.runtime.errors import MAX_LENGTH, InputError
from stages.tracking.live import EXPERIMENT, TAG
from tests.orchestra import until

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


def test_a_run_shows_how_the_machine_is_used(server, params, unet, monkeypatch):
    """A resumed training continues the steps of these metrics."""
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    name = "system/cpu_utilization_percentage"

    def steps():
        found = runs(server) if server.get_experiment_by_name(EXPERIMENT) else []
        return [it.step for run in found for it in server.get_metric_history(run.info.run_id, name)]

    for count in (1, 2):
        with live_logging(RUN, params.finetune, Engine(params.finetune.engine, unet.device)):
            assert until(lambda count=count: len(steps()) >= count, 30)
    assert sorted(set(steps())) == steps()


@pytest.mark.usefixtures("server")
def test_the_machine_is_watched_again_after_an_outage(params, unet, monkeypatch):
    """MLflow's monitor ends at the first request that fails; the next row of the curve begins another."""
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    get_run, is_away = MlflowClient.get_run, []

    def get_run_if_there(self, run_id):
        if is_away:
            raise OSError("the server is away")
        return get_run(self, run_id)

    monkeypatch.setattr(MlflowClient, "get_run", get_run_if_there)

    def watchers():
        return [thread for thread in threading.enumerate() if thread.name == "SystemMetricsMonitor"]

    with live_logging(RUN, params.finetune, Engine(params.finetune.engine, unet.device)) as callback:
        assert until(watchers, 30)
        is_away.append(True)
        assert until(lambda: not watchers(), 30)
        is_away.clear()
        callback(CurvePoint(5, 0.5, ((0.9, 0.4),)), None)
        assert until(watchers, 30)


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
import time
import numpy as np
from stages.tracking import live
run = live.LiveRun("e" * 64, {})
run.log(1, {"loss": 0.5}, np.zeros((1, 1, 8, 8), np.uint8))
input()
live.WAIT_S = 0.5
run.close("FINISHED")
"""


POOLS = """
import threading, time
from concurrent.futures import ThreadPoolExecutor
from stages.tracking import live
threading._register_atexit(live._let_go)
pools = [ThreadPoolExecutor(1), ThreadPoolExecutor(1)]
daemon = threading.Thread(target=lambda: pools[0].submit(threading.Event().wait), daemon=True)
daemon.start()
daemon.join()
pools[1].submit(lambda: (time.sleep(0.2), print("saved")))
"""


def test_only_the_pools_of_a_daemon_thread_are_let_go_at_the_exit(root):
    """A request that hangs in one does not delay it; the program's own pools, such as for uploads, are waited for."""
    command = [sys.executable, "-c", POOLS]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=60)

    assert result.stdout == "saved\n"


@pytest.mark.parametrize("silent", ["tracking server", pytest.param("store of artifacts", marks=pytest.mark.e2e)])
def test_a_server_that_never_answers_does_not_delay_the_exit(root, mlflow_database, monkeypatch, silent):
    """The end of a training waits WAIT_S and warns once; no pending request keeps the process alive."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        if silent == "tracking server":
            monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        else:
            MlflowClient(mlflow_database).create_experiment(EXPERIMENT, artifact_location="s3://bucket/live")
            for name, value in {"ACCESS_KEY_ID": "me", "SECRET_ACCESS_KEY": "x", "ENDPOINT_URL_S3": address}.items():
                monkeypatch.setenv(f"AWS_{name}", value)
        command = [sys.executable, "-c", HANGING]
        with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            server.settimeout(60)
            connection, _ = server.accept()  # the request that is never answered
            begin = time.monotonic()
            _, stderr = process.communicate("close\n", timeout=60)
            connection.close()

    assert stderr.count("Warning: MLflow does not show this training (no answer within 0.5 s)") == 1
    assert process.returncode == 0
    assert time.monotonic() - begin < 10


def test_nothing_is_logged_without_a_server(train, monkeypatch, tmp_path):
    """No local file is written either."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    train()

    assert list(tmp_path.iterdir()) == []
