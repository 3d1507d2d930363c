"""A CUDA device on any machine, whose tensors have no values; and the commands of the stages with their inputs."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import PartialState

from stages.data.images import Images, write_images
from stages.models.layout import PLAN
from stages.models.pipeline import write_pipeline
from stages.models.saliency import write_importance
from stages.prune.params import PruneParams, Target
from stages.prune.pruning import prune_unet
from stages.prune.selection import plan_pruning
from stages.storage.files import write_json
from tests.fake_cuda import FakeCuda, backward
from tests.gpu.commands import Commands

CUDA = torch.device("cuda:0")


@pytest.fixture
def fake_cuda(monkeypatch):
    """Let PyTorch believe that there is one GPU; yields it."""
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "fake",
        "is_bf16_supported": True,
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "mem_get_info": (2**40, 2**40),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda _: None)
    monkeypatch.setattr("torch.utils.weakref", SimpleNamespace(getweakrefs=lambda _: []))  # fake tensors have some
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(PartialState, "default_device", CUDA)
    monkeypatch.setattr("stages.models.structure.structure", lambda _: object())  # no fake tensor outlives the test
    with FakeCuda():
        yield CUDA


@pytest.fixture
def commands(tmp_path, root, make_unet, scheduler, magnitude_of, monkeypatch):
    """The commands of the stages, with models, images and an importance; the reference is not there yet."""
    dense = make_unet(sample_size=16)
    importance = magnitude_of(dense)
    plan = plan_pruning(dense, importance, PruneParams(target=Target(ratio=0.3)), 0)
    models = {"dense": dense, "pruned": prune_unet(copy.deepcopy(dense), plan, None)}
    models["finetuned"] = copy.deepcopy(models["pruned"])
    models["finetuned"].conv_out.bias.data += 0.1
    for name, unet in models.items():
        write_pipeline(tmp_path / name, unet, scheduler)
    write_json(tmp_path / "pruned" / PLAN, plan.to_json())
    (tmp_path / "importance").mkdir()
    write_importance(tmp_path / "importance", importance)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 1, 8, 8)).repeat(2, axis=2).repeat(2, axis=3)
    (tmp_path / "data").mkdir()
    write_images(tmp_path / "data", Images(*np.split(pixels.astype(np.uint8), [24])), {})
    return Commands(tmp_path, root, monkeypatch)
