"""A UNet -> what it costs: parameters and multiply-accumulates."""

import torch_pruning

from stages.diffusion.families import Denoiser, example_inputs, skeleton


def count_params(unet: Denoiser) -> int:
    """Count the parameters."""
    return sum(parameter.numel() for parameter in unet.parameters())


def count_macs(unet: Denoiser) -> int:
    """Count the multiply-accumulates of one forward pass of one image.

    Counted by torch-pruning's module hooks, as in Diff-Pruning's tables: the matrix products inside attention belong to
    no module and are left out. Only shapes matter, so nothing is computed.
    """
    bare = skeleton(unet)
    inputs = example_inputs(bare)
    macs, _ = torch_pruning.utils.count_ops_and_params(bare, (inputs.pop("sample"), *inputs.values()))
    return int(macs)
