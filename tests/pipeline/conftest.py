"""Workspaces: copies of the project in which the pipeline runs as a user runs it, with small numbers."""

import os
import pickletools
import re
import shutil
import signal
import subprocess
import sys
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.storage.files import file_sha256
from tests.orchestra import MARK, command_line, descendants, until
from tests.records import STAGES
from tests.repository import commit, git
from tests.small_numbers import SMALL

ROOT = Path(__file__).parents[2]
PARTS = [
    ".dvc/config",
    ".dvc/plots.html",
    ".dvc/.gitignore",
    ".dvc_state/repo/.gitignore",
    ".dvcignore",
    ".gitignore",
    "dvc.yaml",
    "flows",
    "params.yaml",
    "requirements.lock",
    "stages",
]


@dataclass(frozen=True)
class Workspace:
    """One copy of the project, with its own caches and its own MLflow database."""

    path: Path

    def environment(self):
        """Give the variables of its commands: this Python first on the path, its own folders for Prefect and MLflow."""
        home = self.path.parent / "home"
        home.mkdir(exist_ok=True)
        return {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PREFECT_HOME": str(home / "prefect"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.path}/mlflow.db",
        }

    def run(self, *command):
        """Run a command in its folder."""
        return subprocess.run(
            command, cwd=self.path, env=self.environment(), capture_output=True, text=True, check=False
        )

    def run_until(self, reached, *command, number=signal.SIGKILL, alone=False, seconds=120, **variables):
        """Start a command, signal it once `reached()` is true, and wait until nothing that it started is left.

        Args:
            reached: The condition; a command that ends before gets no signal.
            command: The command, which starts in a session of its own.
            number: The signal.
            alone: Whether the command alone gets it; otherwise its whole process group, as by Ctrl-C.
            seconds: Longest wait for the condition.
            variables: Variables of the environment.

        Returns:
            What it printed.
        """
        log, mark = self.path.parent / "log", uuid.uuid4().hex
        environment = {**self.environment(), MARK: mark, **variables}
        with log.open("w") as file:
            outputs = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            process = subprocess.Popen(command, cwd=self.path, env=environment, start_new_session=True, **outputs)
        done = until(lambda: reached() or process.poll() is not None, seconds, every=0.05)
        with suppress(ProcessLookupError):
            (os.kill if alone else os.killpg)(process.pid, number)
        process.wait(60)
        assert until(lambda: not descendants(mark), 45), [command_line(it) for it in descendants(mark)]
        assert done, f"{command} did not reach the condition in {seconds} s"
        return log.read_text()

    def repro(self, *options):
        """Run `dvc repro`: the names of the stages that ran."""
        result = self.run("dvc", "repro", *options)
        assert result.returncode == 0, result.stdout + result.stderr
        return re.findall(r"Running stage '(\w+)'", result.stdout)

    def set(self, section, **values):
        """Change params.yaml."""
        file = self.path / "params.yaml"
        tree = YAML(typ="safe").load(file.read_text())
        tree[section].update(values)
        YAML(typ="safe").dump(tree, file)

    def weights(self, folder="artifacts/finetuned"):
        """Hash every safetensors file below a folder."""
        return {
            str(path.relative_to(self.path)): file_sha256(path) for path in self.path.glob(f"{folder}/**/*.safetensors")
        }


@pytest.fixture(scope="session")
def is_pickle():
    """Check whether bytes are a pickle of any protocol, or a zip such as torch.save writes."""

    def check(content):
        if content.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
            return True
        try:
            *_, (_, _, position) = pickletools.genops(content)
        except ValueError:
            return False
        return position == len(content) - 1

    return check


@pytest.fixture(scope="session")
def lenient():
    """A promotion policy that models of a dozen training steps pass."""
    return {
        "champion": {"fid": 1e6, "ssim": 1e6, "speed_up": 0.99},
        "dense": {"fid": 1e6, "ssim": 1.0},
        "budget": {"macs": 0.7},
        "latency": {"batch": 1, "precision": "float32", "mode": "eager", "speed_up": 0.0},
        "canary": {"levels": 0.0},
    }


def copy_project(path):
    """Copy the files of the project that the pipeline needs, with small numbers in params.yaml."""
    for part in PARTS:
        source, target = ROOT / part, path / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    workspace = Workspace(path)
    for section, values in SMALL.items():
        workspace.set(section, **values)
    git(path, "init", "-q")
    return workspace


@pytest.fixture(scope="session")
def make_workspace(tmp_path_factory):
    """Make workspaces in which nothing ran yet."""
    return lambda name: copy_project(tmp_path_factory.mktemp(name) / "project")


@pytest.fixture(scope="session")
def finished(make_once):
    """The workspace in which a flow without a server ran the pipeline; all tests share it, so they only read it."""

    def run(folder):
        result = copy_project(folder / "project").run("python", "-m", "flows", "compress")
        assert result.returncode == 0, result.stdout + result.stderr
        assert re.findall(r"Running stage '(\w+)'", result.stdout + result.stderr) == STAGES

    return Workspace(make_once("finished", run) / "project")


@pytest.fixture(scope="session")
def copy_finished(finished, tmp_path_factory):
    """Copy the finished workspace with DVC's cache, without MLflow's records, whose paths are those of the original."""

    def copy(name, *, committed=False):
        path = tmp_path_factory.mktemp(name) / "project"
        ignore = shutil.ignore_patterns("mlflow.db", "mlruns", "unsent", "tmp")
        shutil.copytree(finished.path, path, ignore=ignore, symlinks=True)
        if committed:
            commit(path)
        return Workspace(path)

    return copy
