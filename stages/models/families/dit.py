"""DiTTransformer2DModel: a transformer over patches, with classes and a learned variance (Peebles and Xie, 2023)."""

from pathlib import Path

import torch
from diffusers.models.embeddings import LabelEmbedding, PatchEmbed, get_2d_sincos_pos_embed
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import nn

from stages.models import pruned_dit
from stages.models.families.family import ATTENTION_OUTPUTS, Branch, Config, Denoiser, Family, check_sample_size
from stages.models.pruned_dit import Bypass, PrunedDiTTransformer2DModel, can_go
from stages.runtime.errors import InputError

FREE = ("ff.net.0.proj", *(f"attn1.{side}" for side in ATTENTION_OUTPUTS))
"""Ends of the names of the layers that may lose outputs. All others write into the width between the blocks, which
`pos_embed`, a buffer, and the six chunks of each norm's scale and shift fix, or into the embedding of their norm."""
ACTIVATIONS = ("gelu", "gelu-approximate")
OTHER_INPUTS = ("cross_attention_dim", "caption_channels", "num_vector_embeds")
"""Keys of a Transformer2DModel, the class of DiT's first configs, that no DiT has."""


class DiT(Family):
    """DiTTransformer2DModel."""

    dense, pruned = DiTTransformer2DModel, PrunedDiTTransformer2DModel
    shortcut = Bypass
    aliases = ("Transformer2DModel",)
    code = Path(pruned_dit.__file__)
    component = "transformer"
    pipelines = "DiTPipeline", "DiTPipeline"
    autoencoder = "vae"
    parts = ("pos_embed", "transformer_blocks", "norm_out", "proj_out_1", "proj_out_2")
    layer_counts = ("num_layers",)
    deep_blocks_add = True

    def check_config(self, config: Config, origin: Path) -> None:
        """Check norm, activation, classes, channels, and the sizes of samples and patches.

        Raises:
            InputError: One of them is not supported; its key is named.
        """
        if config["norm_type"] != "ada_norm_zero":
            raise InputError(f"{origin} has norm_type {config['norm_type']!r}; supported: ada_norm_zero, DiT's own")
        if config["activation_fn"] not in ACTIVATIONS:
            found = f"{origin} has activation_fn {config['activation_fn']!r}"
            raise InputError(f"{found}; supported: {' and '.join(ACTIVATIONS)}, which have no gate")
        for key in OTHER_INPUTS:
            if config.get(key) is not None:
                raise InputError(f"{origin} has {key} {config[key]!r}; supported: a DiT of classes, without {key}")
        for key in ("num_embeds_ada_norm", "num_layers", "num_attention_heads", "attention_head_dim", "in_channels"):
            if type(config[key]) is not int or config[key] < 1:
                raise InputError(f"{origin} has {key} {config[key]!r}; supported: a positive integer")
        inputs, outputs = config["in_channels"], config["out_channels"]
        if outputs not in (None, inputs, 2 * inputs):
            found = f"{origin} has in_channels {inputs} and out_channels {outputs!r}"
            raise InputError(f"{found}; supported: equal numbers, or twice as many outputs (learned variance)")
        check_sample_size(config, origin)
        size, patch = config["sample_size"], config["patch_size"]
        if type(size) is not int or type(patch) is not int or patch < 1 or size % patch:
            found = f"{origin} has sample_size {size!r} and patch_size {patch!r}"
            raise InputError(f"{found}; supported: square samples whose side is a multiple of the patch")

    def prepare(self, model: Denoiser) -> None:
        """Compute the table of positions, which no weights file holds, and leave the drop of labels to the training."""
        for module in model.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0
            elif isinstance(module, PatchEmbed) and module.get_buffer("pos_embed").is_meta:
                scales = {"base_size": module.base_size, "interpolation_scale": module.interpolation_scale}
                table = get_2d_sincos_pos_embed(module.proj.out_channels, module.height, **scales, output_type="pt")
                module.register_buffer("pos_embed", table.float().unsqueeze(0), persistent=False)

    def protected(self, model: Denoiser) -> list[nn.Module]:
        """List all layers but those whose outputs stay inside a feed-forward network or an attention."""
        layers = (nn.Conv2d, nn.Linear, nn.Embedding)
        return [it for name, it in model.named_modules() if isinstance(it, layers) and not name.endswith(FREE)]

    def feature_blocks(self, model: Denoiser) -> dict[str, str | None]:
        """Name the blocks, whose width stays, and the hidden layers of their feed-forward networks."""
        blocks = [f"transformer_blocks.{index}" for index in range(model.config["num_layers"])]
        hidden = {f"{name}.ff.net.0": f"{name}.ff.net.0.proj" for name in blocks}
        return {**dict.fromkeys(blocks), **hidden}

    def residual_branches(self, model: Denoiser) -> list[Branch]:
        """List the blocks but the first, which stays and with it a reader of timestep and class."""
        return [Branch(name, "transformer") for name, module in model.named_modules() if can_go(name, module)]

    def deep_blocks(self, model: Denoiser) -> list[str]:
        """Name the blocks between the first and the last, if there are two or more."""
        names = [f"transformer_blocks.{index}" for index in range(1, model.config["num_layers"] - 1)]
        return names if names[1:] else []

    def module_name(self, layer: str) -> str:
        """Name the module of a layer: transformer_blocks.0.attn1.to_q -> block 0 · attention."""
        words = layer.split(".")
        kinds = {"attn1": "attention", "ff": "feed-forward", "norm1": "norm"}
        if words[0] != "transformer_blocks":
            return words[0].replace("_", " ")
        return " · ".join([f"block {words[1]}", *(kinds.get(word, word) for word in words[2:3])])

    def num_labels(self, model: Denoiser) -> int:
        """Return the rows of the embedding of classes."""
        return self.empty_label(model) + 1

    def empty_label(self, model: Denoiser) -> int:
        """Return the row after those of the classes, which diffusers' embedding has for no class."""
        return int(model.config["num_embeds_ada_norm"])

    def example_condition(self, model: Denoiser, batch_size: int) -> dict[str, torch.Tensor]:
        """Spread labels from the first to the empty class."""
        return {"class_labels": torch.linspace(0, self.empty_label(model), batch_size, device=model.device).long()}
