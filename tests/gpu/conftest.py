"""A CUDA device on any machine, whose tensors have no values."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import PartialState

from tests.fake_cuda import FakeCuda, backward

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
    with FakeCuda():
        yield CUDA
