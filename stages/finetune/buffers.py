"""The buffers of a model, which a forward pass may write to, replace or make: copied to another model, or put back."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def make_writable(unet: nn.Module) -> None:
    """Give every buffer memory for all of its elements, which an expanded tensor lacks."""
    for buffer in unet.buffers():
        if 0 in buffer.stride():
            buffer.data = buffer.contiguous()


def copy_buffers(source: nn.Module, target: nn.Module) -> None:
    """Give the buffers of a model to another one of its class, which may not have made all of them yet."""
    known = dict(target.named_buffers(remove_duplicate=False))
    for name, buffer in source.named_buffers(remove_duplicate=False):
        if name in known and known[name].shape == buffer.shape:
            known[name].copy_(buffer)
        else:
            parent, _, own = name.rpartition(".")
            is_saved = own not in source.get_submodule(parent)._non_persistent_buffers_set  # noqa: SLF001
            target.get_submodule(parent).register_buffer(own, buffer.clone(), persistent=is_saved)


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
