"""Trainings that stop and go on, and stages on several processes, on a GPU; every test also runs on the CPU alone."""

import signal

import numpy as np
import pytest
import torch

from stages.finetune.checkpoint import Checkpoints
from stages.finetune.trainer import Trainer
from stages.protocol.extractors import Extractor
from stages.protocol.resolve import make_protocol
from stages.reference.reference import make_reference
from stages.runtime.device import select_device
from tests.gpu.commands import CHANGES, SHARED, UPDATES, contents, gap, steps_between
from tests.orchestra import until
from tests.together import run_together

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
on_each_device = pytest.mark.parametrize("device", ["cpu", CUDA])
slow_on_the_cpu = pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.e2e), CUDA])
ENGINES = {
    "float32": {},
    "bfloat16": {"precision": "bfloat16", "channels_last": True},
    "tf32": {"precision": "tf32", "gradient_checkpointing": True},
    "accumulate": {"accumulate": 2},
}


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("cpu", "float32"),
        *(pytest.param("cpu", name, marks=pytest.mark.e2e) for name in ("bfloat16", "accumulate")),
        *(pytest.param("cuda", name, marks=pytest.mark.gpu) for name in ENGINES),
    ],
)
def test_a_stopped_training_resumes_to_the_same_bits(commands, monkeypatch, device, name):
    """From the file of its last checkpoint, a step before it stopped, with deterministic kernels."""
    engine = {**commands.tree["finetune"]["engine"], **ENGINES[name]}
    expected = contents(commands.run("finetune", device, engine=engine))
    out, step, newest = commands.folder / "stopped", Trainer.step, Checkpoints.newest
    started = []

    def step_or_stop(trainer):
        if trainer.steps_done == 5 and len(started) == 1:
            raise ZeroDivisionError
        step(trainer)

    def note(checkpoints):
        started.append(newest(checkpoints))
        return started[-1]

    monkeypatch.setattr(Trainer, "step", step_or_stop)
    monkeypatch.setattr(Checkpoints, "newest", note)
    with pytest.raises(ZeroDivisionError):
        commands.run("finetune", device, out, engine=engine)

    assert contents(commands.run("finetune", device, out, engine=engine)) == expected
    assert started[0] is None
    assert started[1].step == 4


@slow_on_the_cpu
def test_a_killed_training_resumes_to_the_same_bits(commands, device):
    """A process that SIGKILL ends after its first checkpoint, and another one that goes on from there."""
    steps = {"steps": 60, "checkpoint_every": 10}
    processes = [commands.start("finetune", device, commands.folder / "whole", **steps)]
    processes[0].communicate()
    killed = commands.folder / "killed"
    processes.append(commands.start("finetune", device, killed, **steps))
    assert until(lambda: list(killed.glob("checkpoints/*/step-*")), 120, every=0.01)
    processes[1].send_signal(signal.SIGKILL)
    processes[1].communicate()
    processes.append(commands.start("finetune", device, killed, **steps))
    _, stderr = processes[2].communicate()

    assert [process.returncode for process in processes] == [0, -signal.SIGKILL, 0], stderr
    assert "finetune goes on from step" in stderr
    assert contents(killed) == contents(commands.folder / "whole")


@slow_on_the_cpu
@pytest.mark.parametrize("stage", SHARED)
def test_two_processes_write_what_one_writes(commands, device, stage):
    """Bit for bit on two equal GPUs; gradients of a training are added in another order."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL takes one process for each GPU, and there is one")
    if stage == "evaluate":
        commands.run("reference", "cpu").joinpath("out").rename(commands.folder / "reference")
    alone, both = (commands.finish(stage, device, processes) for processes in (1, 2))

    if stage == "finetune":
        ways = [steps_between(commands.folder / "pruned", folder / "out") for folder in (both, alone)]
        assert gap(*ways) < UPDATES
    else:
        assert contents(both) == contents(alone)


@on_each_device
def test_two_threads_on_one_gpu_draw_what_one_draws(tmp_path, device, params, make_unet, scheduler):
    """As two processes that share the sets of a reference; Gloo takes the place of NCCL, which needs two GPUs."""
    select_device()  # threads have the precision of products in common
    changes = CHANGES["reference"] | {"sampler": params.reference.sampler.model_copy(update={"steps": 4})}
    extractor = Extractor(params.reference.extractor, 2)
    real = np.random.default_rng(0).integers(0, 256, (12, 1, 16, 16)).astype(np.uint8)
    protocol = make_protocol(params.reference.model_copy(update=changes), 0, scheduler, real, extractor)
    unet = make_unet(sample_size=16).to(device)

    def draw(processes):
        folder = tmp_path / str(processes.count)
        folder.mkdir(exist_ok=True)
        make_reference(unet, scheduler, real, protocol, extractor, folder, processes=processes)
        return contents(folder)

    assert run_together(2, draw, device)[0] == run_together(1, draw, device)[0]
