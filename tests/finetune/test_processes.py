"""Several processes that train together."""

import copy
import subprocess
import sys

import pytest
import torch
from ruamel.yaml import YAML

from stages.artifacts import PLAN, read_tensors, write_json
from stages.diffusion.models import write_pipeline
from stages.packed import write_images
from stages.params import PruneParams, Target
from stages.prune.pruning import prune_unet
from stages.prune.selection import plan_pruning


@pytest.fixture
def recover(tmp_path, root, unet, scheduler, images, magnitude):
    """Run the stage on a pruned model with its teacher: what came of it, and what it said."""
    plan = plan_pruning(unet, magnitude, PruneParams(target=Target(ratio=0.3)), 0)
    write_pipeline(tmp_path / "dense", unet, scheduler)
    write_pipeline(tmp_path / "pruned", prune_unet(copy.deepcopy(unet), plan, None), scheduler)
    write_json(tmp_path / "pruned" / PLAN, plan.to_json())
    (tmp_path / "data").mkdir()
    write_images(tmp_path / "data", images, {})

    def run(name, *options, before=(sys.executable, "-m"), **changes):
        params = YAML(typ="safe").load((root / "params.yaml").read_text())
        params["finetune"] |= {"steps": 6, "batch_size": 8, "heldout_every": 3, "checkpoint_every": 3, "samples": None}
        params["finetune"] |= {"loss": {"noise": 1.0, "output": 1.0, "feature": 0.1}} | changes
        YAML().dump(params, tmp_path / f"{name}.yaml")
        folders = {"model": "pruned", "teacher": "dense", "data": "data", "checkpoints": "checkpoints"}
        given = [word for key, value in folders.items() for word in (f"--{key}", str(tmp_path / value))]
        given += ["--params", str(tmp_path / f"{name}.yaml"), "--out", str(tmp_path / name / "out")]
        given += ["--report", str(tmp_path / name / "report"), *options]
        result = subprocess.run(
            [*before, "stages.finetune", *given], cwd=root, capture_output=True, text=True, check=False
        )
        weights = tmp_path / name / "out" / "unet" / "diffusion_pytorch_model.safetensors"
        return read_tensors(weights) if weights.exists() else None, result

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
