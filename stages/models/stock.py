"""A pruned UNet2DModel -> a stock UNet2DModel, if every group was cut by the same share."""

from fractions import Fraction
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d import UNet2DModel

from stages.models.families import Denoiser, example_inputs
from stages.models.pipeline import dense_config
from stages.runtime.errors import InputError

FIRST_WEIGHT, EMBEDDING_WEIGHT = "time_embedding.linear_1.weight", "time_proj.weight"
TOLERANCE = 1e-5
"""Largest relative error of an output that counts as equal in float32."""


def to_stock(unet: Denoiser, num_timesteps: int) -> tuple[UNet2DModel, float]:
    """Convert a pruned UNet to a stock model with the same outputs.

    All layers but the sinusoidal timestep embedding have the stock widths; the embedding keeps the dense width D. Its
    table S over all T timesteps [T, D] has a numerical rank far below D, so the decomposition S = U Σ Vᵀ, cut to the
    stock width w, gives a learned embedding U_w Σ_w and a first layer W V_w with the same product (Eckart and Young,
    1936).

    Args:
        unet: A pruned UNet2DModel.
        num_timesteps: T; the stock model accepts only the integer timesteps below it.

    Returns:
        The stock model, and the largest difference of its outputs at 16 timesteps divided by the largest output.

    Raises:
        InputError: No stock config has these widths, or the table does not fit into the stock width.
    """
    if not isinstance(unet, UNet2DModel) or unet.config["time_embedding_type"] != "positional":
        raise InputError("only a UNet2DModel with a sinusoidal timestep embedding can be converted to a stock model")
    stock = _find_config(unet, num_timesteps)
    tensors = dict(unet.state_dict())
    table, first = compress_sinusoid(unet, num_timesteps, stock.config["block_out_channels"][0])
    stock.to_empty(device=unet.device).load_state_dict({**tensors, EMBEDDING_WEIGHT: table, FIRST_WEIGHT: first})
    error = relative_error(unet, stock.eval(), num_timesteps)
    if not error <= TOLERANCE:
        raise InputError(
            f"the first block is too narrow for the table of timesteps: outputs differ by {error:.1e} of the largest, "
            f"allowed is {TOLERANCE:.0e}; cut fewer channels of the first block (prune.exclude conv_in)"
        )
    return stock, error


def _find_config(unet: UNet2DModel, num_timesteps: int) -> UNet2DModel:
    """Scale all widths of the dense config by one share; returns the model on the meta device whose shapes match.

    Raises:
        InputError: No scaled config matches; the first layer with another width is named.
    """
    dense = dense_config(unet)
    share = Fraction(unet.conv_in.out_channels, dense["block_out_channels"][0])
    widths = [share * width for width in dense["block_out_channels"]]
    head = dense.get("attention_head_dim")
    learned = {"time_embedding_type": "learned", "num_train_timesteps": num_timesteps}
    if dense.get("time_embedding_dim"):
        learned["time_embedding_dim"] = int(share * dense["time_embedding_dim"])
    misfit = f"{float(share):.4g} of {dense['block_out_channels']} is not a whole number"
    for head_width in dict.fromkeys([head, head and int(share * head)]):
        if all(width.denominator == 1 for width in widths):
            scaled = {"block_out_channels": [int(width) for width in widths], "attention_head_dim": head_width}
            stock, misfit = _match({**dense, **learned, **scaled}, unet)
            if stock is not None:
                return stock
    raise InputError(
        f"no stock config has these widths ({misfit}); cut the same share of every group, such as ratio 0.25"
    )


def _match(config: dict[str, Any], unet: UNet2DModel) -> tuple[UNet2DModel | None, str]:
    """Build a config on the meta device and compare its shapes; returns None and the first difference on a mismatch."""
    try:
        with torch.device("meta"):
            stock: UNet2DModel = UNet2DModel.from_config(config)
    except (ValueError, ZeroDivisionError) as error:  # widths that diffusers rejects
        return None, str(error)
    expected = {name: tensor.shape for name, tensor in stock.state_dict().items()}
    for name, tensor in unet.state_dict().items():
        if name != FIRST_WEIGHT and expected.get(name) != tensor.shape:
            return None, f"{name} is {tuple(tensor.shape)}, not {tuple(expected.get(name, ()))}"
    heads = [[m.heads for m in model.modules() if isinstance(m, Attention)] for model in (stock, unet)]
    return (stock, "") if heads[0] == heads[1] else (None, f"attentions have {heads[1]} heads, not {heads[0]}")


def compress_sinusoid(unet: UNet2DModel, num_timesteps: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor the sinusoidal embedding and the layer behind it at rank w: table [T, w], weight [outputs, w]."""
    sinusoid = unet.time_proj(torch.arange(num_timesteps, device=unet.device)).double()
    left, values, right = torch.linalg.svd(sinusoid, full_matrices=False)
    weight = unet.get_parameter(FIRST_WEIGHT).double() @ right[:width].T
    return (left[:, :width] * values[:width]).float(), weight.float()


@torch.no_grad()
def relative_error(unet: Denoiser, other: Denoiser, num_timesteps: int) -> float:
    """Compare two models on noise at 16 timesteps from first to last: largest difference divided by largest output."""
    timesteps = torch.linspace(0, num_timesteps - 1, 16, device=unet.device).round().long()
    shape = example_inputs(unet)["sample"].shape
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(unet.device)
    pairs = [(unet(noise, timestep).sample, other(noise, timestep).sample) for timestep in timesteps]
    differences = [float((one - two).abs().max()) for one, two in pairs]
    return max(differences) / max(torch.finfo(torch.float32).tiny, *(float(one.abs().max()) for one, _ in pairs))
