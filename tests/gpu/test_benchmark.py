"""The benchmark of a GPU on CUDA tensors without values: operations on two devices fail here as there."""

import pytest
import torch

from benchmarks.gpu import parts
from benchmarks.gpu.bench import Bench, Sizes

SIZES = Sizes(batches=(1,), passes=3, images=2, spacing=500, sampler_steps=2, training_steps=1, rounds=1, product=8)
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


@pytest.mark.e2e
@pytest.mark.parametrize("part", [parts.table, parts.importance, parts.finetune, parts.sampling])
def test_every_part_computes_on_one_device(part, fake_cuda, monkeypatch):
    """Ours, the bare loops and diffusers' pipeline, in every precision of an Ampere GPU."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    rows = part(Bench(fake_cuda, ("cifar10",), ("float32", "tf32", "bfloat16"), compiled=False, tiny=True, sizes=SIZES))

    assert {row["reason"] for row in rows} == {""}
    assert {row["precision"] for row in rows} == {"float32", "tf32", "bfloat16"}
