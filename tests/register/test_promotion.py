"""The commands that promote, roll back and show the ledger, and what loads a version."""

import base64
import io
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from mlflow import MlflowClient
from PIL import Image
from ruamel.yaml import YAML

from flows.__main__ import main
from stages.models.sampling import draw
from stages.register.pipeline import load_pipeline
from stages.register.promotion import promote
from tests.register.conftest import NAME

pytestmark = pytest.mark.usefixtures("quick_canary")


def test_the_command_line_prints_reasons_and_history(publish, tmp_path, policy):
    """Promotion, refusal and rollback; the ledger prints user, time, reason and both versions of each."""
    YAML().dump(policy.model_dump(), tmp_path / "policy.yaml")

    def run(*arguments):
        return CliRunner().invoke(
            main, [*arguments, *(["--policy", "policy.yaml"] if arguments[0] != "ledger" else [])]
        )

    publish()
    first = run("promote", NAME)
    assert (first.exit_code, first.output.splitlines()[-1]) == (0, f"models:/{NAME}/1 is the champion")
    assert run("promote", NAME, "--version", f"models:/{NAME}/1").output == (
        f"Error: models:/{NAME}/1 is the champion already\n"
    )
    publish(macs=90)
    refused = run("promote", NAME, "--why", "please")
    assert refused.exit_code == 1
    assert "✗ budget: 90.0% of the dense model's MACs; allowed: 70.0%" in refused.output
    publish()
    assert run("promote", NAME, "--why", "monthly").exit_code == 0
    assert f"models:/{NAME}/1 is the champion again" in run("rollback", NAME, "--why", "bad sevens").output
    lines = run("ledger", NAME).output.splitlines()
    assert len(lines) == 4
    assert "rollback 3 -> 1: done, by " in lines[0]
    assert lines[0].endswith(": bad sevens")
    assert "promote 1 -> 3: done" in lines[1]
    assert ": please; budget: 90.0%" in lines[2]
    assert lines[1].endswith(": monthly")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("promote", "nobody"), "the registry has no models:/nobody@challenger; it has no model nobody"),
        (("promote", NAME, "--version", f"models:/{NAME}/7"), f"it has {NAME} in versions 1"),
        (("promote", NAME, "--version", "3"), "invalid version '3': expected models:/NAME/3 or models:/NAME@champion"),
        (("promote", "../../etc"), "invalid version"),
        (("promote", NAME, "--policy", "none.yaml"), "none.yaml: No such file or directory"),
        (
            ("rollback", NAME, "--why", "x"),
            f"{NAME} has no version with the alias champion, so there is nothing to roll back to",
        ),
        (("rollback", "no'body", "--why", "x"), 'Error: invalid model name "no\'body"; use'),
        (("ledger", "nobody"), "model nobody has no promotions yet"),
    ],
)
def test_bad_input_is_one_line(publish, root, arguments, message):
    """The command prints no traceback."""
    publish()
    policy = (
        [] if "--policy" in arguments or arguments[0] == "ledger" else ["--policy", str(root / "mlflow/promotion.yaml")]
    )
    result = CliRunner().invoke(main, [*arguments, *policy])

    assert message in result.output
    assert result.exit_code == (0 if arguments[0] == "ledger" else 1)
    assert len(result.output.splitlines()) == 1
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit)


def test_a_version_of_another_model_is_refused(publish, root):
    """It would become the champion of a name under which it was never registered."""
    publish()
    policy = ["--policy", str(root / "mlflow/promotion.yaml")]
    result = CliRunner().invoke(main, ["promote", "other", "--version", f"models:/{NAME}/1", *policy])

    assert result.exit_code == 1
    assert result.output == f"Error: models:/{NAME}/1 is a version of {NAME}, not of other\n"


def test_an_unavailable_server_is_one_line(monkeypatch, root):
    """The line contains no password."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{'hidden'}@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    result = CliRunner().invoke(main, ["promote", NAME, "--policy", str(root / "mlflow/promotion.yaml")])

    assert result.exit_code == 75  # EX_TEMPFAIL: a retry may succeed
    assert result.output.startswith("Error: the MLflow registry ")
    assert len(result.output.splitlines()) == 1
    assert "hidden" not in result.output


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://[::1", "the host or port in MLFLOW_TRACKING_URI is invalid; "),
        ("nothing://h", "MLFLOW_TRACKING_URI does not begin with a scheme that is allowed: http:, "),
        ("mysql://h/x", "the MLflow registry "),
        ("sqlite:////dev/null/x", "MLFLOW_TRACKING_URI names a file in /dev/null, which is no folder"),
        ("sqlite:///no-such-folder/mlflow.db", "MLFLOW_TRACKING_URI names a file in "),
    ],
)
def test_an_invalid_address_is_one_line(monkeypatch, uri, message):
    """It names the variable, or what MLflow says of the address."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    result = CliRunner().invoke(main, ["ledger", NAME])

    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert result.stderr.startswith(f"Error: {message}")
    assert not Path("no-such-folder").exists()


def test_diffusers_and_mlflow_load_a_version(publish, policy, unet, scheduler, protocol):
    """load_pipeline gives the pipeline; pyfunc draws the image of a seed, independent of the rest of the batch."""
    publish()
    promote(NAME, None, policy, None)
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    many, one = model.predict({"seed": [5, 6, 7]}), model.predict({"seed": [6]})
    pipeline = load_pipeline(f"models:/{NAME}@champion")

    ours = draw(unet, scheduler, [5, 6, 7], protocol.sampler, batch_size=3, label="ours")
    theirs = [np.asarray(Image.open(io.BytesIO(base64.b64decode(row["png"])))) for row in many]
    np.testing.assert_array_equal(np.stack(theirs)[:, None], ours)
    assert many[1] == one[0]
    assert many[0]["png"] != many[1]["png"]
    sample = torch.zeros(1, 1, 8, 8)
    assert torch.equal(pipeline.unet(sample, 3).sample, unet(sample, 3).sample)
    assert MlflowClient().get_registered_model(NAME).aliases == {"champion": 1}
