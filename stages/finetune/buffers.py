"""The buffers of a model, which a forward pass may write to, replace or make: copied to another model, or put back."""

from collections.abc import Container, Iterator, Mapping
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
    set_buffers(target, dict(source.named_buffers(remove_duplicate=False)), unsaved_buffers(source))


def unsaved_buffers(unet: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that `state_dict` leaves out."""
    return {
        f"{parent}.{name}" if parent else name: buffer
        for parent, module in unet.named_modules(remove_duplicate=False)
        for name, buffer in module._buffers.items()  # noqa: SLF001
        if buffer is not None and name in module._non_persistent_buffers_set  # noqa: SLF001
    }


def set_buffers(unet: nn.Module, values: Mapping[str, torch.Tensor], unsaved: Container[str]) -> None:
    """Set buffers in place; one that is missing or has another shape is made, and not in `state_dict` if unsaved."""
    known = dict(unet.named_buffers(remove_duplicate=False))
    for name, value in values.items():
        if name in known and known[name].shape == value.shape:
            known[name].copy_(value)
        else:
            parent, _, own = name.rpartition(".")
            made = value.to(next(unet.parameters()).device, copy=True)
            unet.get_submodule(parent).register_buffer(own, made, persistent=name not in unsaved)


@contextmanager
def unchanged_buffers(unet: nn.Module) -> Iterator[None]:
    """Put back every buffer in the end: the tensor that it was, or none, and what the tensor held; no new one stays."""
    before = [(module, dict(module._buffers)) for module in unet.modules()]  # noqa: SLF001  # None is one, too
    held = [(buffer, buffer.clone()) for _, buffers in before for buffer in buffers.values() if buffer is not None]
    yield
    for module, buffers in before:
        for name in module._buffers.keys() - buffers.keys():  # noqa: SLF001
            delattr(module, name)
        for name, buffer in buffers.items():
            setattr(module, name, buffer)
    for buffer, content in held:
        buffer.copy_(content)
