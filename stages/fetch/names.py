"""A tensor's name in diffusers -> its name in the code that the model was published with."""

import re
from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]
DDIM = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "down_blocks.": "down.",
    ".resnets.": ".block.",
    ".attentions.": ".attn.",
    ".downsamplers.0.": ".downsample.",
    ".upsamplers.0.": ".upsample.",
    ".group_norm.": ".norm.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".proj_out.",
    ".time_emb_proj.": ".temb_proj.",
    ".conv_shortcut.": ".nin_shortcut.",
    "time_embedding.linear_1.": "temb.dense.0.",
    "time_embedding.linear_2.": "temb.dense.1.",
    "conv_norm_out.": "norm_out.",
}
LDM = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
LDM_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}


def ddim_name(name: str, config: Config) -> str:
    """Translate a tensor name of UNet2DModel to the DDIM code, or one of VQModel to the LDM code.

    There, up blocks are numbered by resolution: the last one is up.0.
    """
    last = len(config["block_out_channels"]) - 1
    return _replace(re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", name), DDIM)


def ldm_name(name: str, config: Config) -> str:
    """Translate a tensor name of UNet2DConditionModel to LDM's UNetModel; names within a transformer are the same."""
    found = re.fullmatch(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.([a-z]+)\.(\d+)\.(.+)", name)
    if found is None:
        return _replace(name, LDM)
    side, level, kind, index, rest = found.groups()
    if kind == "resnets":
        rest = _replace(rest, LDM_RESNET)
    elif kind == "downsamplers":
        rest = rest.replace("conv.", "op.")
    if side is None:
        return f"middle_block.{2 * int(index) + (kind == 'attentions')}.{rest}"
    return f"{_ldm_block(side, int(level), kind, int(index), config)}.{rest}"


def _ldm_block(side: str, level: int, kind: str, index: int, config: Config) -> str:
    """Name a block: LDM numbers down blocks from conv_in on, and puts an upsampler into the ResNet block before it."""
    layers = config["layers_per_block"]
    number = level * (layers + 1) + (layers if kind.endswith("samplers") else index)
    if side == "down":
        return f"input_blocks.{number + 1}.{int(kind == 'attentions')}"
    before_upsampler = 1 + config["up_block_types"][level].startswith("CrossAttn")
    index_in_block = {"resnets": 0, "attentions": 1, "upsamplers": before_upsampler}[kind]
    return f"output_blocks.{number}.{index_in_block}"


def _replace(name: str, rules: Mapping[str, str]) -> str:
    for old, new in rules.items():
        name = name.replace(old, new)
    return name
