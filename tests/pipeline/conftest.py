"""Workspaces: copies of the project in which the whole pipeline runs for real, with small numbers."""

import os
import pickletools
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock
from ruamel.yaml import YAML

from stages.storage.files import file_sha256

ROOT = Path(__file__).parents[2]
PARTS = [
    ".dvc/config",
    ".dvc/.gitignore",
    ".dvcignore",
    ".gitignore",
    "dvc.yaml",
    "flows",
    "params.yaml",
    "requirements.lock",
    "stages",
]
STAGES = ["code", "fetch", "reference", "importance", "prune", "finetune", "evaluate", "costs", "report"]
SMALL = {
    "importance": {"stride": 250, "num_images": 4},
    "finetune": {"steps": 12, "batch_size": 16, "heldout_every": 6, "checkpoint_every": 2},
    "reference": {"num_images": 8, "sets": 2, "kid_subset_size": 4, "kid_subsets": 2, "sampler": {"steps": 2}},
    "costs": {"batches": [1, 2], "repeats": 3, "seconds": 0.5},
}


@dataclass(frozen=True)
class Workspace:
    """One copy of the project, with caches, servers and stores of its own."""

    path: Path

    def environment(self):
        """This Python first on the path, and homes of its own."""
        home = self.path.parent / "home"
        home.mkdir(exist_ok=True)
        return {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PREFECT_HOME": str(home / "prefect"),
            "MLFLOW_TRACKING_URI": f"sqlite:///{self.path}/mlflow.db",
        }

    def run(self, *command):
        """Run a command in it, as a user would in a terminal."""
        return subprocess.run(
            command, cwd=self.path, env=self.environment(), capture_output=True, text=True, check=False
        )

    def run_until(self, reached, *command, seconds=120):
        """Start a command and kill -9 it, and all that it started, once `reached()` is true."""
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=self.path, env=self.environment(), start_new_session=True, **quiet)
        deadline = time.monotonic() + seconds
        while not (done := reached()) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert done, f"{command} did not get there in {seconds} s"

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
    """Say whether bytes are a pickle, of whatever protocol, or a zip, as torch.save makes them of pickles."""

    def ask(content):
        if content.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
            return True
        try:
            *_, (_, _, position) = pickletools.genops(content)
        except ValueError:
            return False
        return position == len(content) - 1

    return ask


@pytest.fixture(scope="session")
def lenient():
    """Give a promotion policy for models of a dozen steps of training, which are not good."""
    return {
        "champion": {"fid": 1e6, "ssim": 1e6, "speed_up": 0.99},
        "dense": {"fid": 1e6, "ssim": 1.0},
        "budget": {"macs": 0.7},
        "latency": {"batch": 1, "precision": "float32", "mode": "eager", "speed_up": 0.0},
        "canary": {"levels": 0.0},
    }


@pytest.fixture(scope="session")
def make_workspace(tmp_path_factory):
    """Make workspaces, all from the same files."""

    def make(name):
        path = tmp_path_factory.mktemp(name) / "project"
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
        subprocess.run(["git", "init", "-q"], cwd=path, check=True)
        return workspace

    return make


@pytest.fixture(scope="session")
def finished(make_workspace, tmp_path_factory):
    """A workspace in which the pipeline ran once; tests leave it up to date. Every worker has its own."""

    def make():
        workspace = make_workspace("finished")
        assert workspace.repro() == STAGES
        return workspace

    if "PYTEST_XDIST_WORKER" not in os.environ:
        return make()
    pristine = tmp_path_factory.getbasetemp().parent / "finished"  # which all workers share
    with FileLock(f"{pristine}.lock"):
        if not pristine.exists():
            workspace = make()
            ignore = shutil.ignore_patterns("mlflow.db", "mlruns")  # they name the place where they lie
            shutil.copytree(workspace.path, f"{pristine}.part", ignore=ignore, symlinks=True)
            Path(f"{pristine}.part").rename(pristine)
            return workspace
    workspace = Workspace(tmp_path_factory.mktemp("finished") / "project")
    shutil.copytree(pristine, workspace.path, symlinks=True)
    recorded = workspace.run("python", "-m", "stages.tracking")
    assert recorded.returncode == 0, recorded.stdout + recorded.stderr
    return workspace
