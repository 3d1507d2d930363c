"""UNet2DModel: the UNet of DDPM, without conditions or with class labels."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d import UNet2DModel
from torch.nn.functional import pad

from stages.models.families.family import NO_STOCK, Config, Denoiser
from stages.models.families.unet import UNet
from stages.models.pruned_unet import PrunedUNet2DModel
from stages.runtime.errors import InputError

FIRST_WEIGHT, EMBEDDING_WEIGHT = "time_embedding.linear_1.weight", "time_proj.weight"


class UNet2D(UNet):
    """UNet2DModel."""

    dense, pruned = UNet2DModel, PrunedUNet2DModel

    def check_inputs(self, config: Config, origin: Path) -> None:
        """Check that timestep 0 and the classes have embeddings.

        Raises:
            InputError: They have not.
        """
        _check_classes(config, origin)
        if config["time_embedding_type"] == "fourier":
            found = f"{origin} has time_embedding_type fourier, which takes the logarithm of the timestep"
            raise InputError(f"{found}, and DDPM's first timestep is 0; supported: positional, learned")

    def num_labels(self, model: Denoiser) -> int | None:
        """Return `num_class_embeds`."""
        number: int | None = model.config["num_class_embeds"]
        return number

    def example_condition(self, model: Denoiser, batch_size: int) -> dict[str, torch.Tensor]:
        """Spread labels from the first to the last class."""
        number = self.num_labels(model)
        if number is None:
            return {}
        return {"class_labels": torch.linspace(0, number - 1, batch_size, device=model.device).long()}

    def to_stock(self, model: Denoiser, num_timesteps: int) -> UNet2DModel:
        """Convert a pruned UNet to a UNet2DModel with a learned table of timesteps.

        All layers but the sinusoidal timestep embedding have the stock widths; the embedding keeps the dense width D.
        Its table S over all T timesteps [T, D] has a numerical rank far below D, so the decomposition S = U Σ Vᵀ, cut
        to the stock width w, gives a learned embedding U_w Σ_w and a first layer W V_w with the same product (Eckart
        and Young, 1936).

        Raises:
            InputError: The embedding is not sinusoidal, or no stock config has these widths.
        """
        if model.config["time_embedding_type"] != "positional":
            raise InputError(NO_STOCK)
        stock = _find_config(model, self.dense_config(model), num_timesteps)
        tensors = dict(model.state_dict())
        table, first = compress_sinusoid(model, num_timesteps, stock.config["block_out_channels"][0])
        stock.to_empty(device=model.device).load_state_dict({**tensors, EMBEDDING_WEIGHT: table, FIRST_WEIGHT: first})
        return stock


def _check_classes(config: Config, origin: Path) -> None:
    """Check that the model embeds numbered classes, and how many.

    Raises:
        InputError: It adds vectors of its caller, or the number is missing or invalid.
    """
    kind, number = config["class_embed_type"], config["num_class_embeds"]
    if kind not in (None, "timestep"):
        reason = "which adds vectors from outside to the timestep's embedding; its channels could not be cut"
        raise InputError(f"{origin} has class_embed_type {kind!r}, {reason}; supported: null, timestep")
    if (number is None and kind) or not (number is None or (type(number) is int and number > 0)):
        found = f"{origin} has num_class_embeds {number!r}{f' and class_embed_type {kind}' if kind else ''}"
        raise InputError(f"{found}; supported: the number of classes{'' if kind else ', or null'}")


def _find_config(unet: Denoiser, dense: Config, num_timesteps: int) -> UNet2DModel:
    """Scale all widths of the dense config by one share; returns the model on the meta device whose shapes match.

    Raises:
        InputError: No scaled config matches; the first layer with another width is named.
    """
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


def _match(config: dict[str, Any], unet: Denoiser) -> tuple[UNet2DModel | None, str]:
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


def compress_sinusoid(unet: Denoiser, num_timesteps: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor the sinusoidal embedding and the layer behind it at rank w: table [T, w], weight [outputs, w]."""
    sinusoid = unet.time_proj(torch.arange(num_timesteps, device=unet.device)).double()
    left, values, right = torch.linalg.svd(sinusoid, full_matrices=False)
    weight = unet.get_parameter(FIRST_WEIGHT).double() @ right[:width].T
    missing = (0, width - len(values[:width]))  # with fewer timesteps than the width, zeros
    return pad(left[:, :width] * values[:width], missing).float(), pad(weight, missing).float()
