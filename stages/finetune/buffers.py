"""The buffers of a model, which a forward pass may write to, replace or make: copied to another model, or put back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def make_writable(unet: nn.Module) -> None:
    """Give every buffer memory for all of its elements, which an expanded tensor lacks."""
    for buffer in unet.buffers():
        if 0 in buffer.stride():
            buffer.data = buffer.contiguous()


def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Give the buffers of a model to another one of its class, which may not have made all of them yet."""
    known = _buffers(target)
    for name, buffer in _buffers(source).items():
        if name in known and known[name].shape == buffer.shape:
            known[name].copy_(buffer)
        else:
            _set(target, name, buffer.clone())


@contextmanager
def unchanged_buffers(unet: nn.Module) -> Iterator[None]:
    """Put back every buffer in the end: the tensor that it was, or none, and what the tensor held."""
    before = _buffers(unet)
    held = {name: buffer.clone() for name, buffer in before.items()}
    yield
    for name in before | _buffers(unet):
        _set(unet, name, before.get(name))
    for name, buffer in before.items():
        buffer.copy_(held[name])


def _buffers(unet: nn.Module) -> dict[str, torch.Tensor]:
    return dict(unet.named_buffers(remove_duplicate=False))


def _set(unet: nn.Module, name: str, buffer: torch.Tensor | None) -> None:
    parent, _, own = name.rpartition(".")
    setattr(unet.get_submodule(parent), own, buffer)
