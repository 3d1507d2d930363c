"""The commands of the stages, run on one device or the other with the same inputs, and what they wrote."""

import importlib
import math
import os
import subprocess
import sys
from itertools import count

import torch
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from ruamel.yaml import YAML

from stages.models.pipeline import weights_file
from stages.storage.tensors import read_tensors

UPDATES = 0.01
"""Relative distance of the weights' changes in a training. Adam divides a gradient by its size, so weights whose
gradient is nothing but rounding errors move by up to the learning rate in either direction; they are few. The CPU with
and without oneDNN differs by 5e-5."""
DENSE, MODELS = {"model": "dense"}, {name: name for name in ("dense", "pruned", "finetuned")}
INPUTS = {
    "reference": {**DENSE, "data": "data"},
    "importance": {**DENSE, "data": "data"},
    "prune": {**DENSE, "data": "data", "importance": "importance"},
    "finetune": {"model": "pruned", "teacher": "dense", "data": "data"},
    "evaluate": {**MODELS, "reference": "reference"},
    "costs": MODELS,
}
OUTPUTS = {
    "reference": ["out"],
    "importance": ["out", "report"],
    "prune": ["out"],
    "finetune": ["checkpoints", "out", "report"],
    "evaluate": ["report"],
    "costs": ["report"],
}
SHARED = ("reference", "importance", "finetune", "evaluate")
"""The stages that several processes may share."""
CHANGES = {
    "reference": {
        "num_images": 8,
        "sets": 2,
        "batch_size": 2,
        "kid_subset_size": 5,
        "kid_subsets": 4,
        "sampler": {"steps": 4},
    },
    "importance": {"num_images": 2, "stride": 100, "report": {"timesteps": 2, "draws": 2}},
    "prune": {"compensate": {"num_images": 4, "num_timesteps": 2, "rounds": 2}},
    "finetune": {
        "steps": 6,
        "batch_size": 8,
        "loss": {"noise": 1.0, "output": 1.0, "feature": 0.1},
        "heldout_images": 8,
        "heldout_every": 3,
        "checkpoint_every": 2,
        "samples": {"every": 6, "num_images": 2, "steps": 2},
    },
    "costs": {"batches": [1, 16], "precisions": ["float32"], "repeats": 6, "seconds": 60.0},
}


class Commands:
    """Runs the commands of the stages in a folder with the inputs of all of them."""

    def __init__(self, folder, root, monkeypatch):
        self.folder, self.root, self.monkeypatch, self.numbers = folder, root, monkeypatch, count()
        self.tree = YAML(typ="safe").load((root / "params.yaml").read_text())
        for stage, changes in CHANGES.items():
            self.tree[stage] |= changes

    def arguments(self, stage, out, processes=None, **changes):
        """Write the params with changes to the stage's block, and return the arguments of its command."""
        params = out.with_suffix(".yaml")
        YAML().dump({**self.tree, stage: {**self.tree.get(stage, {}), **changes}}, params)
        given = {"params": params} | {key: self.folder / path for key, path in INPUTS[stage].items()}
        given |= {name: out / name for name in OUTPUTS[stage]}
        if stage in SHARED:
            given["processes"] = processes or 1
        return [text for key, value in given.items() for text in (f"--{key}", str(value))]

    def run(self, stage, device, out=None, **changes):
        """Run a stage in this process on a device; returns the folder of its outputs."""
        out = out or self.folder / f"{stage}-{next(self.numbers)}"
        main = importlib.import_module(f"stages.{stage}.__main__").main
        AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the device of the run before
        with self.monkeypatch.context() as patch:
            if device == "cpu":
                patch.setattr(torch.cuda, "is_available", lambda: False)
            result = CliRunner().invoke(main, self.arguments(stage, out, **changes), prog_name=stage)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return out

    def start(self, stage, device, out, processes=1, **changes):
        """Start a stage as a process on a device, with one thread for sums on the CPU."""
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        environment = {**os.environ, **hidden, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", f"stages.{stage}", *self.arguments(stage, out, processes, **changes)]
        return subprocess.Popen(command, cwd=self.root, env=environment, stderr=subprocess.PIPE, text=True)

    def finish(self, stage, device, processes=1):
        """Run a stage as a process, or as several; returns the folder of its outputs."""
        out = self.folder / f"{stage}-{next(self.numbers)}"
        process = self.start(stage, device, out, processes)
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr
        return out


def contents(folder):
    """Return the content of each file that does not say where and when it was written."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "provenance" not in path.name]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def gap(found, expected):
    """Relative distance of two sets of named tensors, each set taken as one vector."""
    assert found.keys() == expected.keys()
    wide = [(found[name].double(), tensor.double()) for name, tensor in expected.items()]
    distance = sum(float((one - other).square().sum()) for one, other in wide)
    return math.sqrt(distance / sum(float(other.square().sum()) for _, other in wide))


def weights(folder):
    """Read the weights of a model folder."""
    return read_tensors(weights_file(folder))


def steps_between(before, after):
    """Read by how much a training moved the weights of a model folder."""
    start = weights(before)
    return {name: tensor - start[name] for name, tensor in weights(after).items()}
