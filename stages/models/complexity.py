"""A denoiser -> its costs: parameters, multiply-accumulates (MACs), memory."""

from collections.abc import Mapping
from typing import Any

import torch
import torch_pruning
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from stages.models.families import Denoiser, example_inputs, forward, skeleton
from stages.models.latency import forward_pass
from stages.models.structure import once_per_structure


def count_params(unet: nn.Module) -> int:
    """Count the parameters of a denoiser."""
    return sum(parameter.numel() for parameter in unet.parameters())


def weights_bytes(unet: Denoiser) -> int:
    """Return the size of parameters and buffers in bytes."""
    return sum(tensor.nbytes for tensor in (*unet.parameters(), *unet.buffers()))


@once_per_structure
def count_macs(unet: Denoiser) -> int:
    """Count the multiply-accumulates of one forward pass of one image, on the meta device.

    torch-pruning's module hooks count them, as in Diff-Pruning's tables. The matrix products inside attention belong to
    no module and are not included, except those of nn.MultiheadAttention, which is a module.
    """
    meta_unet = skeleton(unet)
    inputs = example_inputs(meta_unet)
    macs, _ = torch_pruning.utils.count_ops_and_params(meta_unet, (inputs.pop("sample"), *inputs.values()))
    return int(macs)


def count_module_macs(unet: Denoiser) -> dict[str, int]:
    """Count the multiply-accumulates of each module without submodules: its name -> its part of `count_macs`."""
    meta_unet = skeleton(unet)
    inputs = example_inputs(meta_unet)
    arguments = (inputs.pop("sample"), *inputs.values())
    _, _, macs, _ = torch_pruning.utils.count_ops_and_params(meta_unet, arguments, layer_wise=True)
    leaves = {name: module for name, module in meta_unet.named_modules() if not any(module.children())}
    return {name: int(macs[module] or 0) for name, module in leaves.items()}


def count_attention_macs(unet: Denoiser) -> int:
    """Count the multiply-accumulates of the products inside attention, q·kᵀ and weights·v, of one image.

    PyTorch's FlopCounterMode counts them as batched matrix products; these models have no others. Those of
    nn.MultiheadAttention, which an own class may have, are in `count_macs`, and not here.
    """
    meta_unet = skeleton(unet)
    with FlopCounterMode(display=False) as counter:
        forward(meta_unet, example_inputs(meta_unet))
    root, flops = type(meta_unet).__name__, counter.get_flop_counts()
    counted = [name for name, module in meta_unet.named_modules() if isinstance(module, nn.MultiheadAttention)]
    inside = sum(_products(flops.get(f"{root}.{name}", {})) for name in counted)
    return (_products(flops["Global"]) - inside) // 2


def _products(flops: Mapping[Any, int]) -> int:
    """Sum the floating-point operations of batched matrix products."""
    return sum(int(flops.get(operation, 0)) for operation in (torch.ops.aten.bmm, torch.ops.aten.baddbmm))


@torch.inference_mode()
def measure_peak_bytes(unet: Denoiser, batch_size: int) -> int:
    """Measure the peak memory of weights and activations in an eager forward pass, in bytes.

    On a GPU: the allocator's peak above its level before the pass, plus the weights. On the CPU: the largest sum of
    live tensors, without the scratch memory of kernels.
    """
    run = forward_pass(unet, batch_size)
    if unet.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return int(torch.cuda.max_memory_allocated()) - before + weights_bytes(unet)
    with MemTracker() as tracker:
        run()
    return int(tracker.get_tracker_snapshot("peak")[unet.device]["Total"])
