"""Several processes for one stage: their number, and the exit code."""

import re
import signal
import subprocess
import sys

import pytest
import torch
from ruamel.yaml import YAML

from stages.runtime.launch import count_processes, exit_code, start_processes
from stages.runtime.processes import join, shared_folder
from stages.runtime.stopping import stopped_line
from tests.servers import ROOT, own_environment
from tests.small_project import make_small_project


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([1, -15], 1), ([-15, 75], 75), ([143, 143], 143), ([-9], 137), ([-15, -9], 137), ([-15], 143)],
)
def test_the_exit_code_is_that_of_the_process_that_failed(codes, expected):
    """Those that the launcher then ends by SIGTERM do not count; of a signal alone it is 128 plus its number."""
    assert exit_code(codes) == expected


def test_there_is_one_process_on_the_cpu_and_one_for_each_gpu(monkeypatch):
    """A given number comes first."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)

    assert count_processes(None, torch.device("cpu")) == 1
    assert count_processes(None, torch.device("cuda")) == 8
    assert count_processes(3, torch.device("cpu")) == count_processes(3, torch.device("cuda")) == 3


def test_one_process_starts_no_other(monkeypatch):
    """Nor does one that a launcher has started."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert start_processes("reference", 1) is None
    alone = join(torch.device("cpu"))
    assert (alone.index, alone.count, alone.is_main) == (0, 1, True)
    assert alone.gather([1.5]) == [[1.5]]

    monkeypatch.setenv("LOCAL_RANK", "1")
    assert start_processes("reference", 8) is None


def test_the_folder_of_a_launch_lies_beside_the_output(monkeypatch, tmp_path):
    """All of its processes know it, and a name with separators stays one name."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "../a/b")

    assert shared_folder(tmp_path / "out") == tmp_path.resolve() / ".out.ab"


@pytest.mark.e2e
def test_a_signal_to_the_launcher_leaves_no_images(make_once, make_unet, tmp_path):
    """All of its processes end, and with them the folder that they share; the exit code is that of the signal."""
    project = make_once("small-project-None", lambda folder: make_small_project(folder, make_unet))
    params = YAML(typ="safe").load((project / "params.yaml").read_text())
    params["reference"] |= {"num_images": 5000, "batch_size": 8, "sampler": {"steps": 100}}  # for minutes
    YAML(typ="safe").dump(params, tmp_path / "params.yaml")
    words = ["--params=params.yaml", f"--model={project / 'artifacts/pretrained'}", f"--data={project / 'data'}"]
    command = [sys.executable, "-m", "stages.reference", *words, "--out=out", "--processes=2"]
    environment = own_environment() | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment) as process:
        said = [next(line for line in process.stderr if re.search(r"images/s|left", line))]
        shared = [path.name for path in tmp_path.iterdir()]
        process.send_signal(signal.SIGTERM)
        said.append(process.communicate(timeout=60)[1])

    assert process.returncode == 128 + signal.SIGTERM, said
    assert said[1] == f"{stopped_line(signal.SIGTERM)}\n"
    assert any(name.startswith(".out.") for name in shared)
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]
