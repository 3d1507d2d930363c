"""A pruned model -> a stock model, if a config of its dense class can describe its widths."""

import torch

from stages.models.families import Denoiser, example_inputs, family_of, forward
from stages.models.shortcuts import bypassed
from stages.runtime.errors import InputError

TOLERANCE = 1e-5
"""Largest relative error of an output that counts as equal in float32."""


def to_stock(unet: Denoiser, num_timesteps: int) -> tuple[Denoiser, float]:
    """Convert a pruned model to a stock model with the same outputs, as its family can.

    Args:
        unet: A pruned model.
        num_timesteps: T; the stock model accepts only the integer timesteps below it.

    Returns:
        The stock model, and the largest difference of its outputs at 16 timesteps divided by the largest output.

    Raises:
        InputError: No stock config has these widths, residual branches were removed, or the outputs differ.
    """
    if removed := bypassed(unet):
        found = f"{removed[0]} and {len(removed) - 1} other modules" if removed[1:] else removed[0]
        raise InputError(f"no stock config has {found} without its residual branch; set prune.depth to null")
    stock = family_of(unet).to_stock(unet, num_timesteps)
    error = relative_error(unet, stock.eval(), num_timesteps)
    if not error <= TOLERANCE:
        raise InputError(
            f"the first block is too narrow for the table of timesteps: outputs differ by {error:.1e} of the largest, "
            f"allowed is {TOLERANCE:.0e}; cut fewer channels of the first block (prune.exclude conv_in)"
        )
    return stock, error


@torch.no_grad()
def relative_error(unet: Denoiser, other: Denoiser, num_timesteps: int) -> float:
    """Compare two models on noise at 16 timesteps from first to last: largest difference divided by largest output."""
    timesteps = torch.linspace(0, num_timesteps - 1, 16, device=unet.device).round().long()
    inputs = example_inputs(unet)
    noise = torch.randn(inputs["sample"].shape, generator=torch.Generator().manual_seed(0)).to(unet.device)
    steps = [{**inputs, "sample": noise, "timestep": timestep[None]} for timestep in timesteps]
    pairs = [(forward(unet, step), forward(other, step)) for step in steps]
    differences = [float((one - two).abs().max()) for one, two in pairs]
    return max(differences) / max(torch.finfo(torch.float32).tiny, *(float(one.abs().max()) for one, _ in pairs))
