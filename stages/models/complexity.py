"""A UNet -> what it costs: parameters, multiply-accumulates, memory."""

import torch
import torch_pruning
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from stages.models.families import Denoiser, example_inputs, skeleton
from stages.models.latency import forward_pass


def count_params(unet: Denoiser) -> int:
    """Count the parameters."""
    return sum(parameter.numel() for parameter in unet.parameters())


def weights_bytes(unet: Denoiser) -> int:
    """Measure the memory of parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*unet.parameters(), *unet.buffers()))


def count_macs(unet: Denoiser) -> int:
    """Count the multiply-accumulates of one forward pass of one image.

    Counted by torch-pruning's module hooks, as in Diff-Pruning's tables: the matrix products inside attention belong to
    no module and are left out. Only shapes matter, so nothing is computed.
    """
    bare = skeleton(unet)
    inputs = example_inputs(bare)
    macs, _ = torch_pruning.utils.count_ops_and_params(bare, (inputs.pop("sample"), *inputs.values()))
    return int(macs)


def count_attention_macs(unet: Denoiser) -> int:
    """Count the multiply-accumulates of the products inside attention, q·kᵀ and weights·v, of one image.

    Counted by PyTorch's FlopCounterMode, which sees them as batched matrix products; there are no others.
    """
    bare = skeleton(unet)
    with FlopCounterMode(display=False) as counter:
        bare(**example_inputs(bare))
    products = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
    counts = counter.get_flop_counts()["Global"]
    return sum(int(counts.get(product, 0)) for product in products) // 2


@torch.inference_mode()
def measure_peak_bytes(unet: Denoiser, batch_size: int) -> int:
    """Measure the most memory that weights and activations take at once in an eager forward pass.

    On a GPU what its allocator handed out at most beyond what was there before; on the CPU the tensors alive at once,
    without what kernels keep for themselves.
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
