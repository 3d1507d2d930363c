"""UNet2DConditionModel: a UNet with cross-attention to the embedding of a class, as in latent diffusion."""

from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from stages.models.families.family import Config, Denoiser
from stages.models.families.unet import UNet
from stages.models.pruned_unet import PrunedUNet2DConditionModel
from stages.runtime.errors import InputError


class ConditionalUNet2D(UNet):
    """UNet2DConditionModel."""

    dense, pruned = UNet2DConditionModel, PrunedUNet2DConditionModel

    def check_inputs(self, config: Config, origin: Path) -> None:
        """Check that the condition is one sequence of vectors.

        Raises:
            InputError: It is not.
        """
        if config.get("attention_type", "default") != "default":
            found = f"{origin} has attention_type {config['attention_type']!r}"
            raise InputError(f"{found}; supported: default (no grounding by boxes)")
        if type(config["cross_attention_dim"]) is not int:
            found = f"{origin} has cross_attention_dim {config['cross_attention_dim']!r}"
            raise InputError(f"{found}; supported: one integer")

    def condition_width(self, model: Denoiser) -> int:
        """Return D of encoder_hidden_states [B, S, D]."""
        return int(model.config["cross_attention_dim"])

    def example_condition(self, model: Denoiser, batch_size: int) -> dict[str, torch.Tensor]:
        """Build a zero condition of one vector."""
        return {"encoder_hidden_states": torch.zeros(batch_size, 1, self.condition_width(model), device=model.device)}
