"""The stage as it is started: alone, as several processes, with mistakes, and asked to stop."""

import copy
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from ruamel.yaml import YAML

from stages.data.images import write_images
from stages.models.layout import PLAN
from stages.models.pipeline import write_pipeline
from stages.prune.params import PruneParams, Target
from stages.prune.pruning import prune_unet
from stages.prune.selection import plan_pruning
from stages.storage.files import write_json
from stages.storage.tensors import read_tensors


@pytest.fixture
def recover(tmp_path, root, unet, scheduler, images, magnitude):
    """Run the stage on a pruned model with its teacher: what came of it, and what it said."""
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
        given = [word for key, value in folders.items() if value for word in (f"--{key}", str(tmp_path / value))]
        given += ["--params", str(tmp_path / f"{name}.yaml"), "--out", str(tmp_path / name / "out")]
        return [*before, "stages.finetune", *given, "--report", str(tmp_path / name / "report"), *options]

    def run(name, *options, **changes):
        started = command(name, *options, **changes)
        result = subprocess.run(started, cwd=root, capture_output=True, text=True, check=False)
        weights = tmp_path / name / "out" / "unet" / "diffusion_pytorch_model.safetensors"
        return read_tensors(weights) if weights.exists() else None, result

    run.command = command
    return run


def test_two_processes_equal_one(recover):
    """The same global batch in two halves: within float32's rounding; and nothing is written or said twice."""
    alone, _ = recover("alone")
    together, result = recover(
        "together", before=(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m")
    )
    assert result.returncode == 0, result.stderr
    differences = [float((together[name] - alone[name]).abs().max()) for name in alone]
    print(f"largest difference of a weight: {max(differences):.2g}")

    assert together.keys() == alone.keys()
    assert max(differences) > 0  # there were two of them
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, atol=2e-5, rtol=1e-4)
    assert result.stderr.count("finetune will take") == 1
    option, result = recover("option", "--processes", "2")
    assert all(torch.equal(option[name], together[name]) for name in together)


def test_a_batch_that_two_cannot_share_is_refused(recover):
    """Before anything is computed."""
    weights, result = recover("odd", "--processes", "2", batch_size=7)

    assert weights is None
    assert result.returncode != 0
    assert "Error: finetune.batch_size 7 cannot be shared by 2 processes in 1 parts each" in result.stderr


def stop(command, root, number):
    """Start the stage and send it a signal while it trains: its exit code, and what it said."""
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    said = []
    for line in process.stderr:
        said.append(line)
        if "finetune will take" in line:
            time.sleep(1)
            process.send_signal(number)
            break
    said.append(process.communicate(timeout=60)[1])
    return process.returncode, "".join(said)


@pytest.mark.parametrize("processes", ["1", "2"])
def test_sigterm_saves_and_leaves(recover, root, tmp_path, processes):
    """With the exit code of the signal, and without a traceback; the same command goes on from there."""
    steps = {"steps": 100_000, "heldout_every": 100_000, "checkpoint_every": 100_000}
    command = recover.command("stopped", "--processes", processes, **steps)
    code, said = stop(command, root, signal.SIGTERM)
    again, said_again = stop(command, root, signal.SIGTERM)
    step = re.search(r"stopped by SIGTERM after step (\d+), which is saved", said)[1]

    assert (code, again) == (143, 143), said
    assert "Traceback" not in said
    assert f"finetune goes on from step {step}" in said_again
    assert not (tmp_path / "stopped").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
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
def test_a_mistake_is_told_in_one_line(recover, tmp_path, changes, words):
    """What was found and what to change; nothing is written, and checkpoints stay."""
    weights, result = recover("wrong", **changes)
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]

    assert (weights, result.returncode) == (None, 1)
    assert len(errors) == 1, result.stderr
    assert words in errors[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "wrong").exists()
