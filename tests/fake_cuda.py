"""CUDA tensors without a GPU: they have shapes and devices and no values, and operations across devices fail."""

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

INDEXING = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")
"""Operations that accept indices on the CPU for a tensor on a GPU, but not the reverse."""
TOGETHER = ("_foreach_", "_fused_", "allclose", "equal")
"""Beginnings of the names of operations whose tensors the fake ones do not compare."""


READ = {
    torch.ops.aten._local_scalar_dense.default: lambda tensor: torch.ones((), dtype=tensor.dtype).item(),
    torch.ops.aten.equal.default: lambda *_: True,
    torch.ops.aten.allclose.default: lambda *_, **__: True,
}
"""Operations that read a number: 1, true, or equal."""


class FakeCuda(FakeTensorMode):
    """Inside this context tensors on the CPU are real, and those on CUDA fake.

    An operation on tensors of both devices raises an exception where CUDA would. What is copied to the CPU is zeros
    there, and what is read as a number is 1.
    """

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.is_inside = False

    @property
    def avoid_device_init(self):
        """Never start CUDA, also where torch.cuda is made to say that it is there."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.is_inside:  # the fake tensors' own operations
            return super().__torch_dispatch__(func, types, args, kwargs)
        leaves = tree_leaves((args, kwargs or {}))
        if not any(isinstance(leaf, FakeTensor) or _is_cuda(leaf) for leaf in leaves):
            return func(*args, **kwargs or {})
        if func.namespace == "aten" and func._can_decompose():
            with self:  # in inference mode nothing has taken composite operations apart
                return func.decompose(*args, **kwargs or {})
        _check(func, leaves)
        if func in READ:
            return READ[func](*args, **kwargs or {})
        if func is torch.ops.aten.copy_.default and not isinstance(args[0], FakeTensor):
            return args[0].zero_()
        self.is_inside = True
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs or {})
        finally:
            self.is_inside = False
        return tree_map(_real_on_cpu, result)


def _is_cuda(leaf):
    return isinstance(leaf, torch.device) and leaf.type == "cuda"


def _real_on_cpu(leaf):
    if isinstance(leaf, FakeTensor) and leaf.device.type == "cpu":
        return torch.zeros(leaf.shape, dtype=leaf.dtype)
    return leaf


def _check(func, leaves):
    """Raise what CUDA raises and the fake tensors let pass: indices and generators of another device."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    name = func._schema.name.removeprefix("aten::")
    if name in INDEXING and tensors[0].device.type == "cpu" and any(it.device.type != "cpu" for it in tensors):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if name.startswith(TOGETHER) and len({it.device.type for it in tensors if it.ndim}) > 1:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    if any(isinstance(leaf, torch.Generator) and leaf.device.type == "cpu" for leaf in leaves):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


def backward(loss, *_, **__):
    """Give every leaf that a loss depends on a gradient, in place of a backward pass, which needs a GPU."""
    waiting, seen = [loss.grad_fn], set()
    assert loss.shape == (), "grad can be implicitly created only for scalar outputs"
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if (leaf := getattr(node, "variable", None)) is not None:
                leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad + torch.zeros_like(leaf)
            waiting += [following for following, _ in node.next_functions]
