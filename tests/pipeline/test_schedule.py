"""Schedules, workers and servers as in production, all of them real; and what each of them leaves when it dies."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from ruamel.yaml import YAML

from tests.orchestra import PrefectServer, Worker, command_line, until
from tests.records import STAGES
from tests.repository import commit
from tests.servers import POSTGRES_BINS, ROOT, own_environment, running, running_stack, s3_client, s3_environment
from tests.swift import SECRET

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not POSTGRES_BINS or not sys.platform.startswith("linux"), reason="needs PostgreSQL: apt-get install postgresql"
    ),
]
POOL = "espalier"
DEPLOYMENTS = [
    "compress/compress",
    "sweep/sweep",
    "compare/compare",
    "nightly/nightly",
    "reproduce/weekly",
    "promote/promote",
]


class Production:
    """A project, its servers and its workers."""

    def __init__(self, root, project, servers, prefect):
        self.root, self.project, self.prefect = root, project, prefect
        self.postgres, self.swift, self.mlflow = servers
        self.workers = []
        (root / "empty").touch()  # dvc-s3 fails at the /dev/null that suits boto3
        files = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), str(root / "empty"))
        s3 = {**s3_environment(self.swift), **files}
        s3_client(self.swift).create_bucket(Bucket="espalier")
        self.environment = {
            **self.mlflow.client_environment(),
            **s3,
            "ESPALIER_STORE": "s3://espalier/store",
            "ESPALIER_HOME": str(root / "home"),
            "OMP_NUM_THREADS": "1",
        }

    def start_worker(self, name, **changes):
        """Start a worker of the pool, with room for a sweep and one cell: it cannot take all cells at once."""
        folder, environment = self.root / "workers", {**self.environment, **changes}
        worker = Worker(folder, self.prefect, POOL, name, self.root, limit=2, **environment)
        worker.start()
        self.workers.append(worker)
        return worker

    def run(self, *command, fails=False):
        """Run a command in the project, as somebody who knows the way to the servers."""
        environment = own_environment(**self.environment, **self.prefect.client_environment())
        result = subprocess.run(
            command, cwd=self.project.path, env=environment, capture_output=True, text=True, check=False
        )
        assert (result.returncode != 0) == fails, result.stdout + result.stderr
        return result.stdout + result.stderr

    def commit(self, message):
        """Commit everything."""
        commit(self.project.path, message)

    def client(self):
        """Talk to MLflow."""
        return MlflowClient(self.mlflow.uri)

    def compressions(self):
        """Count the finished compressions that MLflow knows."""
        client = self.client()
        experiment = client.get_experiment_by_name("espalier")
        found = client.search_runs([experiment.experiment_id]) if experiment else []
        assert all(run.info.status == "FINISHED" for run in found)
        return len(found)

    def compress(self, **given):
        """Ask the workers for a compression."""
        return self.prefect.submit("compress/compress", **{"limits": {}, **given})

    def ran(self, *runs):
        """List the stages that computed in some runs."""
        lines = [line for run in runs for line in self.prefect.lines(run)]
        return sorted(line.split("'")[1] for line in lines if line.startswith("Running stage '"))

    def orphans(self):
        """List what workers started and what still lives, after a moment to die."""
        alive = [worker for worker in self.workers if worker.process]
        until(lambda: not any(worker.orphans() for worker in alive), 30)
        return [process for worker in alive for process in worker.orphans()]

    def wait_for(self, run, text, seconds=180):
        """Wait until a run has logged something."""
        assert until(lambda: any(text in line for line in self.prefect.lines(run)), seconds, every=0.5), text

    def message(self, run):
        """Read what the last state of a run says."""
        return self.prefect.request(f"flow_runs/{run}")["state"]["message"]


@contextmanager
def webhook():
    """Take notifications, as a chat would: a list that fills."""
    heard = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield SimpleNamespace(heard=heard, url=f"http://127.0.0.1:{server.server_port}/hook")
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def chat():
    """The chat of the operators."""
    with webhook() as found:
        yield found


@pytest.fixture(scope="module")
def production(tmp_path_factory, make_workspace, lenient, chat):
    """Everything, started once, with all of the project's deployments."""
    root = tmp_path_factory.mktemp("production")
    root.chmod(0o755)
    project = make_workspace("production")
    for name in ("prefect.yaml", "pyproject.toml"):
        shutil.copyfile(ROOT / name, project.path / name)
    for name in ("mlflow", "recipes/presets"):
        shutil.copytree(ROOT / name, project.path / name)
    YAML().dump(lenient, project.path / "mlflow" / "promotion.yaml")
    file = project.path / "prefect.yaml"
    tree = YAML(typ="safe").load(file.read_text())
    for entry in tree["deployments"]:
        if "limits" in entry["parameters"]:
            entry["parameters"]["limits"] = {}
    YAML(typ="safe").dump(tree, file)
    with ExitStack() as stack:
        servers = stack.enter_context(running_stack(root / "servers"))
        postgres = servers[0]
        prefect = PrefectServer(root / "prefect", postgres.new_database(), **postgres.environment)
        found = Production(root, project, servers, stack.enter_context(running(prefect)))
        found.run("dvc", "remote", "add", "-d", "store", "s3://espalier/dvc")
        found.commit("Begin")
        found.environment["ESPALIER_NOTIFY"] = "custom-webhook/chat"
        block = f"""
from prefect.blocks.notifications import CustomWebhookNotificationBlock as Hook
Hook(name="chat", url={chat.url!r}, method="POST",
     json_data={{"subject": "{{{{subject}}}}", "body": "{{{{body}}}}"}}).save("chat")
"""
        found.run("python", "-c", block)
        yield found
        for worker in found.workers:
            worker.kill()


@pytest.fixture(autouse=True)
def _reads_its_records(production, as_client):
    """Make each test a client of the project's MLflow."""
    as_client(production.mlflow)


def test_a_missing_pool_and_its_remedy(production):
    """One line, and the command that it gives works."""
    said = production.run("python", "-m", "flows", "deploy", fails=True)
    assert "the server has no work pool 'espalier'; make it: prefect work-pool create espalier" in said
    assert len(said.splitlines()) == 1
    production.run(*said.strip().partition("make it: ")[2].split())
    deployed = production.run("python", "-m", "flows", "deploy", "--schedules")
    assert "nightly/nightly: at 0 2 * * *" in deployed


def test_cron_creates_runs(production):
    """All deployments are there, and the scheduler, which some libraries break silently, makes runs of both crons."""
    for name in DEPLOYMENTS:
        assert production.prefect.request(f"deployments/name/{name}")["status"] == "NOT_READY"

    def scheduled():
        return {
            name: production.prefect.request("flow_runs/count", {"deployments": {"name": {"any_": [name]}}})
            for name in ("nightly", "weekly")
        }

    assert until(lambda: min(scheduled().values()) >= 3, 60)
    print(f"scheduled runs: {scheduled()}")


def test_a_scheduled_run_makes_a_champion(production):
    """By the cron alone, in a workspace of its own: run, version, artifacts are in MLflow, no checkout is touched."""
    before = production.run("git", "status", "--porcelain")
    file = production.project.path / "prefect.yaml"
    text = file.read_text()
    file.write_text(text.replace("cron: 0 2 * * *", 'cron: "* * * * *"'))
    production.run("python", "-m", "flows", "deploy")
    file.write_text(text)
    production.start_worker("first")

    def finished():
        asked = {"deployments": {"name": {"any_": ["nightly"]}}, "sort": "END_TIME_DESC"}
        runs = production.prefect.request("flow_runs/filter", asked)
        return [run for run in runs if run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED")]

    assert until(finished, 400, every=1)
    (run, *_) = finished()
    assert run["state"]["name"] == "Completed", run["state"]["message"]
    assert run["auto_scheduled"]
    production.run("python", "-m", "flows", "deploy")  # the cron of the file again, every night
    print(f"{run['name']}: {run['total_run_time']:.0f} s, {run['state']['message']}")

    client = production.client()
    champion = client.get_model_version_by_alias("espalier-digits", "champion")
    reports = [file.path for file in client.list_artifacts(champion.run_id, "reports/evaluate")]
    assert champion.version in ("1", 1)
    assert "reports/evaluate/evaluation.json" in reports
    assert production.run("git", "status", "--porcelain") == before
    assert until(lambda: not list((production.root / "home" / "workspaces").iterdir()), 60)
    artifacts = production.prefect.request("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run["id"]]}}})
    keys = {artifact["key"] for artifact in artifacts}
    assert {"results", "samples", "pareto", "mlflow"} <= keys
    assert any(key.startswith("progress-") for key in keys)


def test_a_refused_promotion_is_told(production, lenient, chat):
    """The chat hears of it, with the reason; the run completes under another name."""
    strict = lenient | {"budget": {"macs": 0.1}}
    YAML().dump(strict, production.project.path / "strict.yaml")
    production.commit("A strict policy")
    run = production.prefect.submit(
        "nightly/nightly", overrides={"finetune.steps": 13}, policy="strict.yaml", limits={}
    )
    assert production.prefect.wait(run, 900) == "Refused"
    assert until(lambda: any("was refused" in it["body"] for it in chat.heard), 30)
    print(production.message(run))


def test_two_workers_share_a_sweep(production):
    """What cells share is computed once, both workers are at it, and the best becomes a version."""
    second = production.start_worker("second")
    run = production.prefect.submit(
        "sweep/sweep",
        grid={"importance.criterion": ["random", "magnitude"], "prune.target.macs": ["50%", "70%"]},
        runner="pool",
        limits={},
    )
    assert production.prefect.wait(run, 900) == "Completed", production.message(run)
    asked = {"deployments": {"name": {"any_": ["compress"]}}}
    cells = production.prefect.request("flow_runs/filter", asked)
    ran = production.ran(*(cell["id"] for cell in cells))
    assert {stage: ran.count(stage) for stage in STAGES} == {
        "code": 0,
        "fetch": 0,
        "reference": 0,
        "importance": 2,
        "prune": 4,
        "rounds": 4,
        "finetune": 4,
        "evaluate": 4,
        "variants": 4,
        "costs": 4,
        "report": 4,
    }
    workers = [event["resource"]["prefect.resource.name"] for event in _submissions(production)]
    assert {"first", "second"} <= set(workers)
    artifacts = production.prefect.request("artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}})
    assert {"sweep", "sweep-table", "sweep-pareto"} <= {artifact["key"] for artifact in artifacts}
    assert "models:/espalier-digits/" in production.message(run)
    second.stop()
    print(production.message(run))


def _submissions(production):
    """List which worker took which run."""
    asked = {"filter": {"event": {"name": ["prefect.worker.executed-flow-run"]}, "occurred": {"since": "2020-01-01"}}}
    return production.prefect.request("events/filter", asked)["events"]


def test_a_stage_that_fails(production, chat):
    """The stage's own words reach the state and the chat; nothing is tried again, nothing recorded, no process left."""
    before = production.compressions()
    run = production.compress(overrides={"prune.target.ratio": 0.99})
    assert production.prefect.wait(run, 200) == "Failed"
    assert "prune.target.ratio 0.99 leaves 0 of" in production.message(run)
    assert production.ran(run) == ["prune"]
    assert until(lambda: any("leaves 0 of" in it["body"] for it in chat.heard), 30)
    assert not any("Traceback" in line for line in production.prefect.lines(run))
    assert production.compressions() == before
    assert production.orphans() == []


def test_a_stage_that_hangs(production):
    """It is ended at its limit, which is not tried again; without the limit it goes on from its checkpoint."""
    overrides = {"finetune.steps": 150}
    run = production.compress(overrides=overrides, limits={"finetune": 0.25})
    assert production.prefect.wait(run, 200) == "Failed"
    assert "ran past its limit of 0.25 minutes" in production.message(run)
    assert production.orphans() == []
    _goes_on(production, overrides)


def _goes_on(production, overrides, before=None):
    """Ask for the same again: it completes from where it was."""
    again = production.compress(overrides=overrides)
    assert production.prefect.wait(again, 900) == "Completed", production.message(again)
    assert any("finetune goes on from step" in line for line in production.prefect.lines(again))
    assert not {"fetch", "reference", "importance", "prune"} & set(production.ran(again))
    assert before is None or production.compressions() == before + 1
    assert production.orphans() == []


def test_cancel_during_finetune(production):
    """The button of the page ends everything that belongs to the run."""
    before, overrides = production.compressions(), {"finetune.steps": 151}
    run = production.compress(overrides=overrides)
    production.wait_for(run, "Running stage 'finetune'")
    time.sleep(12)
    production.prefect.cancel(run)
    assert production.prefect.wait(run, 90) == "Cancelled"
    assert production.orphans() == []
    _goes_on(production, overrides, before)


def _flow_process(worker):
    """Find the process of the only flow that a worker runs."""
    (found,) = (it for it in worker.orphans() if "prefect.engine" in command_line(it))
    return found


def test_kill_9_of_the_flow(production, chat):
    """The worker says so, the chat hears it, nothing lives on, and the next run goes on."""
    before, overrides = production.compressions(), {"finetune.steps": 152}
    run = production.compress(overrides=overrides)
    production.wait_for(run, "Running stage 'finetune'")
    time.sleep(12)
    _flow_process(production.workers[0]).kill()
    assert production.prefect.wait(run, 60) == "Crashed"
    assert until(lambda: any("Crashed" in it["body"] for it in chat.heard), 60)
    assert production.orphans() == []
    _goes_on(production, overrides, before)


def test_kill_9_of_the_worker(production):
    """Its flow goes on without it and completes; a new worker takes the next."""
    before = production.compressions()
    run = production.compress(overrides={"finetune.steps": 60})
    production.wait_for(run, "Running stage 'finetune'")
    dead = production.workers[0]
    dead.strike()
    assert production.prefect.wait(run, 200) == "Completed"
    assert until(lambda: dead.orphans() == [], 60)
    production.workers[0] = production.start_worker("third")
    production.workers.pop()
    assert production.compressions() == before + 1


def test_kill_9_of_flow_and_worker_together(production):
    """As a machine that is lost, but for the stage: that dies, too, and the next run goes on."""
    overrides = {"finetune.steps": 153}
    run = production.compress(overrides=overrides)
    production.wait_for(run, "Running stage 'finetune'")
    time.sleep(12)
    dead = production.workers[0]
    flow = _flow_process(dead)
    dead.strike()
    flow.kill()
    assert until(lambda: dead.orphans() == [], 60)
    production.workers[0] = production.start_worker("fourth")
    production.workers.pop()
    assert until(lambda: production.prefect.state(run) == "Crashed", 200, every=2)  # by the automation of the deploy
    _goes_on(production, overrides)


def test_a_server_that_is_away_for_a_minute(production):
    """Killed in the middle of a run, which goes on and completes."""
    before = production.compressions()
    run = production.compress(overrides={"finetune.steps": 61})
    production.wait_for(run, "Running stage 'finetune'")
    production.prefect.kill()
    time.sleep(60)
    production.prefect.start()
    assert production.prefect.wait(run, 240) == "Completed", production.message(run)
    assert production.compressions() == before + 1
    assert production.orphans() == []


def test_s3_and_mlflow_away_for_a_minute(production):
    """Tasks are tried again until both are back; it is recorded once."""
    before = production.compressions()
    run = production.compress(overrides={"finetune.steps": 62})
    production.wait_for(run, "Running stage 'finetune'")
    production.swift.kill()
    production.mlflow.kill()
    time.sleep(60)
    production.swift.start()
    production.mlflow.start()
    assert production.prefect.wait(run, 900) == "Completed", production.message(run)
    print([line for line in production.prefect.lines(run) if "Retry" in line])
    assert production.compressions() == before + 1
    print(production.message(run))


def test_two_at_once(production):
    """The same compression twice at the same moment, on two workers: computed once, recorded once."""
    second = production.start_worker("fifth")
    before = production.compressions()
    runs = [production.compress(overrides={"finetune.steps": 14}) for _ in range(2)]
    assert [production.prefect.wait(run, 900) for run in runs] == ["Completed", "Completed"]
    assert production.ran(*runs) == ["costs", "evaluate", "finetune", "report", "rounds", "variants"]
    assert production.compressions() == before + 1
    second.stop()
    production.workers.remove(second)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to mount a small disk")
def test_a_full_disk(production, tmp_path):
    """One line says it; with room, the next run completes, and nothing is damaged."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        old = production.workers[0]
        old.stop()
        changed = {key: value for key, value in production.environment.items() if key != "ESPALIER_HOME"}
        worker = Worker(
            production.root / "workers",
            production.prefect,
            POOL,
            "sixth",
            production.root,
            **changed,
            ESPALIER_HOME=str(disk),
        )
        worker.start()
        production.workers[0] = worker
        run = production.compress(overrides={"finetune.steps": 15})
        assert production.prefect.wait(run, 900) == "Failed"
        assert "space" in production.message(run) or "full" in production.message(run), production.message(run)
        assert production.orphans() == []
        print(production.message(run))
        subprocess.run(["mount", "-o", "remount,size=400m", str(disk)], check=True)
        again = production.compress(overrides={"finetune.steps": 15})
        assert production.prefect.wait(again, 900) == "Completed", production.message(again)
    finally:
        for worker in production.workers:
            worker.kill()
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_nothing_secret_was_said(production):
    """Not in what workers and servers wrote, nor in a command line."""
    said = [program.output() for program in (*production.workers, production.prefect)]
    said += [line for program in (*production.workers, production.prefect) for line in program.command_lines]
    hidden = [production.prefect.password, production.mlflow.password, production.postgres.password, SECRET]
    assert len(said) > 2
    assert not any(secret in text for secret in hidden for text in said)
