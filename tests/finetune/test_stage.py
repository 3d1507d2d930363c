"""The stage as a command: one process and several, invalid input, SIGTERM."""

import copy
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress

import psutil
import pytest
import torch
from click.testing import CliRunner
from ruamel.yaml import YAML

from stages.data.images import write_images
from stages.finetune.__main__ import main
from stages.finetune.launch import count_gpus
from stages.models.layout import PLAN
from stages.models.pipeline import read_unet, write_pipeline
from stages.prune.params import PruneParams, Target
from stages.prune.pruning import prune_unet
from stages.prune.selection import plan_pruning
from stages.runtime.device import device_name
from stages.storage.files import read_json, write_json
from stages.storage.tensors import read_tensors


@pytest.fixture
def recover(tmp_path, root, unet, scheduler, images, magnitude):
    """Return a function that runs the stage on a pruned model and returns the weights, the exit code and stderr."""
    plan = plan_pruning(unet, magnitude, PruneParams(target=Target(ratio=0.3)), 0)
    write_pipeline(tmp_path / "dense", unet, scheduler)
    write_pipeline(tmp_path / "pruned", prune_unet(copy.deepcopy(unet), plan, None), scheduler)
    write_json(tmp_path / "pruned" / PLAN, plan.to_json())
    (tmp_path / "data").mkdir()
    write_images(tmp_path / "data", images, {})

    def command(name, *options, before=(sys.executable, "-m"), teacher="dense", **changes):
        params = YAML(typ="safe").load((root / "params.yaml").read_text())
        params["finetune"] |= {"steps": 6, "batch_size": 8, "heldout_every": 3, "checkpoint_every": 3, "samples": None}
        params["finetune"] |= {"loss": {"noise": 1.0, "output": 1.0, "feature": 0.1}} | changes
        YAML().dump(params, tmp_path / f"{name}.yaml")
        folders = {"model": "pruned", "teacher": teacher, "data": "data", "checkpoints": "checkpoints"}
        given = [
            argument for key, value in folders.items() if value for argument in (f"--{key}", str(tmp_path / value))
        ]
        given += ["--params", str(tmp_path / f"{name}.yaml"), "--out", str(tmp_path / name / "out")]
        return [*before, "stages.finetune", *given, "--report", str(tmp_path / name / "report"), *options]

    def run(name, *options, **changes):
        if "before" in changes or options:  # several processes
            arguments = command(name, *options, **changes)
            result = subprocess.run(arguments, cwd=root, capture_output=True, text=True, check=False)
            code = result.returncode
        else:
            result = CliRunner().invoke(main, command(name, before=(), **changes)[1:], prog_name="finetune")
            code = result.exit_code
        weights = tmp_path / name / "out" / "unet" / "diffusion_pytorch_model.safetensors"
        return read_tensors(weights) if weights.exists() else None, code, result.stderr

    run.command = command
    return run


COUNT_HASHES = """
import hashlib, os
from pathlib import Path

def record(file, digest, real=hashlib.file_digest):
    with Path(__file__).with_name("hashed").open("a") as log:
        log.write(f"{os.environ.get('RANK')} {Path(file.name).name}\\n")
    return real(file, digest)

hashlib.file_digest = record
"""
"""Python imports it as it starts: writes down which process hashes which file."""


@pytest.mark.e2e  # test_trainer has the rule of the parts, this the processes
def test_two_processes_equal_one(recover, tmp_path, monkeypatch):
    """Two halves of one batch give the same weights within float32's rounding; files and messages appear once.

    One process hashes the inputs, each file once.
    """
    single, _, _ = recover("single")
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "sitecustomize.py").write_text(COUNT_HASHES)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'start'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    double, code, stderr = recover("double", "--processes", "2")
    assert code == 0, stderr
    hashed = Counter(line for line in (tmp_path / "start" / "hashed").read_text().splitlines() if ".npy" in line)
    assert hashed == {"0 train.npy": 1, "0 heldout.npy": 1}
    differences = [float((double[name] - single[name]).abs().max()) for name in single]
    print(f"largest difference of a weight: {max(differences):.2g}")

    assert double.keys() == single.keys()
    assert max(differences) > 0  # two processes sum in another order
    for name, tensor in single.items():
        torch.testing.assert_close(double[name], tensor, atol=2e-5, rtol=1e-4)
    assert stderr.count("finetune will take") == 1


@pytest.mark.e2e  # test_loss has the rule, this the processes
def test_two_processes_train_by_features_alone(recover):
    """The last layers, which get no gradient, are waited for, too."""
    single, _, _ = recover("single", loss={"noise": 0.0, "output": 0.0, "feature": 1.0})
    double, code, stderr = recover("double", "--processes", "2", loss={"noise": 0.0, "output": 0.0, "feature": 1.0})
    assert code == 0, stderr
    for name, tensor in single.items():
        torch.testing.assert_close(double[name], tensor, atol=2e-5, rtol=1e-3)


APART = """
import os, torch
from stages.finetune.engine import Engine
from stages.finetune.params import EngineParams
Engine(EngineParams(), torch.device("cpu")).check_equal(500 * int(os.environ["RANK"]))
"""


@pytest.mark.e2e
def test_processes_that_resume_at_different_steps_are_refused(tmp_path):
    """Machines without a common folder of checkpoints would average gradients of different weights."""
    (tmp_path / "apart.py").write_text(APART)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(tmp_path / "apart.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)

    assert result.returncode != 0
    assert "the processes go on from the steps 0, 500; give all machines one folder of checkpoints" in result.stderr


UNUSED = """
import torch
from diffusers import UNet2DModel
from stages.finetune.engine import Engine
from stages.finetune.params import EngineParams

shape = {"block_out_channels": (16,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
unet = UNet2DModel(sample_size=8, norm_num_groups=4, **shape)
unet.unused = torch.nn.Linear(2, 2)
model = Engine(EngineParams(), torch.device("cpu")).wrap(unet)
for _ in range(3):
    model(torch.ones(1, 3, 8, 8), 0).sample.sum().backward()
without = [name for name, parameter in unet.named_parameters() if parameter.grad is None]
assert without == ["unused.weight", "unused.bias"]
"""


@pytest.mark.e2e
def test_processes_do_not_wait_for_parameters_that_forward_does_not_use(tmp_path):
    """A class of one's own may have some; they stay as they are, as with one process."""
    (tmp_path / "unused.py").write_text(UNUSED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(tmp_path / "unused.py")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)

    assert result.returncode == 0, result.stderr


@pytest.mark.e2e  # test_jacobian has the rule of the parts, this the processes
def test_two_processes_equal_one_with_the_jacobian_loss(recover):
    """Its gradients, which precede the wrapped model's, are summed over the processes with the others."""
    loss = {"noise": 1.0, "output": 1.0, "jacobian": {"weight": 100.0, "every": 2, "images": 4}}
    single, _, _ = recover("single", loss=loss)
    plain, _, _ = recover("plain", loss=loss | {"jacobian": None})
    double, code, stderr = recover("double", "--processes", "2", loss=loss, engine={"accumulate": 2})
    assert code == 0, stderr

    assert max(float((plain[name] - single[name]).abs().max()) for name in single) > 1e-4  # the loss is seen
    for name, tensor in single.items():
        torch.testing.assert_close(double[name], tensor, atol=2e-5, rtol=1e-3)


def test_images_of_the_jacobian_loss_that_do_not_divide_are_refused(recover, tmp_path):
    """The error comes once, before a process starts."""
    loss = {"noise": 1.0, "jacobian": {"weight": 0.1, "images": 2}}
    arguments = recover.command("odd", "--processes", "4", before=(), loss=loss)[1:]
    result = CliRunner().invoke(main, arguments, prog_name="finetune")
    found = "finetune.loss.jacobian.images 2 does not divide by 4 processes of 1 parts each"

    assert (result.exit_code, result.stderr) == (1, f"Error: {found}; make it a multiple of 4\n")
    assert not (tmp_path / "odd").exists()


def test_the_cost_of_a_training_names_its_precision_and_kernels(recover, tmp_path):
    """Times under other settings do not compare."""
    engine = {"precision": "bfloat16", "deterministic": False}
    _, code, stderr = recover("fast", engine=engine, teacher=None, loss={"noise": 1.0}, snapshots=[2, 4])
    cost = read_json(tmp_path / "fast" / "out.provenance.json")["cost"]

    assert code == 0, stderr
    assert {name: cost[name] for name in engine} == engine
    assert cost["measured_s"] > 0
    assert 0 < cost["seconds_by_step"]["2"] <= cost["seconds_by_step"]["4"] <= cost["seconds_by_step"]["6"]
    assert cost["seconds_by_step"]["6"] <= cost["measured_s"]
    assert (cost["alone"], cost["machine"]) == (True, device_name())
    assert read_json(tmp_path / "fast" / "report.provenance.json")["cost"] == cost
    weights = [read_unet(tmp_path / "fast" / "out" / it).conv_in.weight for it in ("snapshots/2", "snapshots/4", "")]
    assert len({it.shape for it in weights}) == 1
    assert len({str(it) for it in weights}) == 3
    assert (tmp_path / "fast" / "out" / "snapshots" / "2" / PLAN).is_file()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.e2e
def test_torchrun_starts_the_same_processes(recover):
    """The weights are those of --processes 2."""
    option, _, _ = recover("option", "--processes", "2")
    torchrun, code, stderr = recover(
        "torchrun", before=(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m")
    )

    assert code == 0, stderr
    assert all(torch.equal(option[name], torchrun[name]) for name in torchrun)


def test_a_batch_that_does_not_divide_is_refused(recover, tmp_path):
    """The error comes once, before a process starts."""
    arguments = recover.command("odd", "--processes", "2", before=(), batch_size=7)[1:]
    result = CliRunner().invoke(main, arguments, prog_name="finetune")

    assert result.exit_code == 1
    message = "Error: finetune.batch_size 7 does not divide by 2 processes of 1 parts each; make it a multiple of 2\n"
    assert result.stderr == message
    assert not (tmp_path / "odd").exists()


@pytest.mark.parametrize(
    ("available", "batch_size", "accumulate", "used"),
    [(8, 128, 1, 8), (6, 128, 1, 4), (7, 128, 1, 4), (5, 15, 1, 5), (3, 7, 1, 1), (8, 24, 2, 6)],
)
def test_the_most_gpus_that_share_a_batch_are_used(available, batch_size, accumulate, used, capsys):
    """A line names the number if it is not all of them."""
    assert count_gpus(available, batch_size, accumulate) == used
    assert (f"divides by {used} of the {available} GPUs" in capsys.readouterr().err) == (used < available)


@pytest.mark.e2e
def test_a_signal_to_one_process_stops_all(recover, root):
    """The one that got none saves the checkpoint, or waits for it, and the exit code is that of the signal."""
    steps = {"steps": 100_000, "heldout_every": 100_000, "checkpoint_every": 100_000}
    for index in (0, 1):
        command = recover.command("one", "--processes", "2", **steps)
        code, stderr = stop(command, root, signal.SIGTERM, lambda process, index=index: trainers(process)[index])

        assert code == 143, stderr
        assert "Traceback" not in stderr
        assert "stopped by SIGTERM after step" in stderr


def trainers(process):
    """List the processes that train, by rank."""
    ranked = {}
    for found in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):  # others, such as git, end meanwhile
            ranked[found.environ().get("RANK")] = found
    ranked.pop(None, None)
    return [ranked[rank] for rank in sorted(ranked)]


def stop(command, root, number, choose=lambda process: process):
    """Start the stage and send it, or the process of it that is chosen, a signal: its exit code and stderr."""
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "finetune will take" in line:
            time.sleep(1)
            choose(process).send_signal(number)
            break
    lines.append(process.communicate(timeout=60)[1])
    return process.returncode, "".join(lines)


@pytest.mark.e2e  # test_trainer has the rule
@pytest.mark.parametrize("processes", ["1", "2"])
def test_sigterm_saves_a_checkpoint_and_exits(recover, root, tmp_path, processes):
    """The exit code is that of the signal, without a traceback; the same command resumes."""
    steps = {"steps": 100_000, "heldout_every": 100_000, "checkpoint_every": 100_000}
    command = recover.command("stopped", "--processes", processes, **steps)
    code, stderr = stop(command, root, signal.SIGTERM)
    again, stderr_again = stop(command, root, signal.SIGTERM)
    step = re.search(r"stopped by SIGTERM after step (\d+), which is saved", stderr)[1]

    assert (code, again) == (143, 143), stderr
    assert "Traceback" not in stderr
    assert f"finetune goes on from step {step}" in stderr_again
    assert not (tmp_path / "stopped").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "finetune.loss distils from the dense model; give it with --teacher"),
        ({"teacher": "pruned"}, "pruned was cut from a model with sha256"),
        ({"batch_size": 25}, "finetune.batch_size 25 is more than the 24 training images"),
        ({"learning_rate": 1e30, "steps": 60}, "lower finetune.learning_rate; the last checkpoint is kept"),
        ({"steps": 60, "gate": 1e-9}, "finetune.gate is 1e-09; prune less, train longer, or set finetune.gate to null"),
        ({"init": "scratch"}, "init scratch has no channels of the dense model; set loss.feature to 0"),
        ({"ema_decays": [0.9, 0.9]}, "ema_decays names a decay twice"),
    ],
)
def test_invalid_input_gives_a_one_line_error(recover, tmp_path, changes, message):
    """Nothing is written."""
    weights, code, stderr = recover("wrong", **changes)
    errors = [line for line in stderr.splitlines() if line.startswith("Error: ")]

    assert (weights, code) == (None, 1)
    assert len(errors) == 1, stderr
    assert message in errors[0]
    assert "Traceback" not in stderr
    assert not (tmp_path / "wrong").exists()
