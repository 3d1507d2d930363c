"""Pages that Espalier starts or has written: in a browser, no request leaves the machine."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

from flows.server import server_environment
from stages.tracking.mlflow_client import connect, find_experiment
from stages.tracking.runs import EXPERIMENT
from tests.orchestra import bare_environment, until
from tests.pipeline.test_page import browser  # noqa: F401  # a fixture
from tests.repository import commit, git
from tests.servers import ROOT
from tests.swift import free_ports

pytestmark = pytest.mark.e2e
PASSWORD = "one-that-nobody-knows"  # pragma: allowlist secret
LOCAL = {"127.0.0.1", "localhost", "", None}
"""Hosts of requests that stay on the machine; files and data have none."""


@pytest.fixture
def visit(browser):  # noqa: F811
    """Open addresses one after the other in one context: the last page, and the requests that left the machine."""
    context = browser.new_context()
    page, left = context.new_page(), []
    context.on("request", lambda it: left.append(it.url) if urlsplit(it.url).hostname not in LOCAL else None)

    def open_all(*addresses):
        for address in addresses:
            page.goto(address)
            page.wait_for_timeout(4000)  # pages ask for more while they are open
        return page, left

    yield open_all
    context.close()


@contextmanager
def running(command, cwd, environment):
    """Run a program that ends with its standard input or on SIGTERM; yields its process."""
    with subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def test_mlflow_asks_nobody_else(tmp_path, mlflow_database, visit):
    """Runs, one run, the version of a model, and the settings, which say that statistics are collected."""
    client = connect()
    experiment = find_experiment(client, EXPERIMENT)
    run = client.create_run(experiment, run_name="digits · diff-pruning · ratio 0.3").info
    client.log_metric(run.run_id, "1 FID", 0.4)
    client.create_registered_model("espalier-digits")
    client.create_model_version("espalier-digits", run.artifact_uri, run.run_id)
    (port,) = free_ports(1)
    program = f"from flows.ui import ui; ui(['--no-open', '--port', '{port}'])"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": mlflow_database, "PYTHONPATH": str(ROOT)}
    with running([sys.executable, "-u", "-c", program], tmp_path, environment) as process:
        runs = process.stdout.readline().strip()
        top = f"http://127.0.0.1:{port}/#"
        page, _ = visit(runs)
        page.get_by_text("digits · diff-pruning · ratio 0.3").first.wait_for()
        one = f"{top}/experiments/{experiment}/runs/{run.run_id}"
        _, left = visit(one, f"{top}/models/espalier-digits/versions/1", f"{top}/settings", f"{top}/")

    assert left == []


def test_prefect_asks_nobody_else(tmp_path, monkeypatch, visit):
    """Also where its second page would be."""
    (port,) = free_ports(1)
    monkeypatch.chdir(tmp_path)
    for name, value in bare_environment(PREFECT_HOME=str(tmp_path / "prefect"), PYTHONPATH=str(ROOT)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PREFECT_SERVER_API_PORT", str(port))
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", f"espalier:{PASSWORD}")
    command = [sys.executable, "-m", "flows.prefect_command", "--no-prompt", "server", "start"]
    address = f"http://127.0.0.1:{port}"
    with running(command, tmp_path, server_environment()):
        assert until(lambda: subprocess.run(["curl", "-sf", f"{address}/api/health"], check=False).returncode == 0, 200)
        page, _ = visit(address)
        page.fill("input", f"espalier:{PASSWORD}")
        page.keyboard.press("Enter")
        _, left = visit(f"{address}/runs", f"{address}/deployments", f"{address}/settings", f"{address}/v2")

    assert left == []


def test_the_page_of_plots_draws_them_itself(tmp_path, visit):
    """Lines, points and bars of two commits, as `dvc plots diff` writes them."""
    (tmp_path / "dvc.yaml").write_text(
        "plots:\n"
        "  - loss.csv: {x: step, y: loss, title: Loss}\n"
        "  - speed.csv: {x: step, y: loss, template: scatter}\n"
        "  - layers.csv: {x: loss, y: layer, template: bar_horizontal}\n"
    )
    (tmp_path / ".dvc").mkdir()
    for name in ("config", "plots.html", ".gitignore"):
        shutil.copyfile(ROOT / ".dvc" / name, tmp_path / ".dvc" / name)
    git(tmp_path, "init", "-q")
    for factor in (1, 2):
        rows = [(step, factor / (step + 1), f"layer {step}") for step in range(4)]
        for name in ("loss.csv", "speed.csv", "layers.csv"):
            lines = ["step,loss,layer", *(",".join(map(str, row)) for row in rows)]
            (tmp_path / name).write_text("\n".join(lines) + "\n")
        commit(tmp_path)
    subprocess.run([sys.executable, "-m", "dvc", "plots", "diff", "HEAD~1", "HEAD"], cwd=tmp_path, check=True)
    page, left = visit((tmp_path / "dvc_plots" / "index.html").as_uri())

    assert left == []
    drawn = {name: page.locator(name).count() for name in ("svg", "polyline", "circle", "rect")}
    assert drawn == {"svg": 3, "polyline": 2, "circle": 8, "rect": 8}
