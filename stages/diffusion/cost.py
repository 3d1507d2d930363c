"""A UNet -> what it costs: parameters and multiply-accumulates."""

import torch
import torch_pruning
from diffusers.models.unets.unet_2d import UNet2DModel


def example_inputs(unet: UNet2DModel) -> tuple[torch.Tensor, torch.Tensor]:
    """One image of the model's size and one timestep, on the model's device."""
    channels, size = unet.config["in_channels"], unet.config["sample_size"]
    return torch.zeros(1, channels, size, size, device=unet.device), torch.zeros(1, device=unet.device).long()


def count_params(unet: UNet2DModel) -> int:
    """Count the parameters."""
    return sum(parameter.numel() for parameter in unet.parameters())


def count_macs(unet: UNet2DModel) -> int:
    """Count the multiply-accumulates of one forward pass of one image.

    Counted by torch-pruning's module hooks, as in Diff-Pruning's tables: the matrix products inside attention belong to
    no module and are left out.
    """
    macs, _ = torch_pruning.utils.count_ops_and_params(unet, example_inputs(unet))
    return int(macs)
