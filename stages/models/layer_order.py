"""Names of a UNet's layers -> the order in which they run, and the module that each belongs to."""

from collections.abc import Iterable

PARTS = ("time_embedding", "conv_in", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out")
"""Parts of a UNet in the order in which they run; diffusers registers the middle block last."""
KINDS = ("attentions", "resnets", "downsamplers", "upsamplers")


def in_run_order(layers: Iterable[str]) -> list[str]:
    """Order layers by the part of the UNet that they belong to; inside a part they stay as they are."""
    places = {part: place for place, part in enumerate(PARTS)}
    return sorted(layers, key=lambda layer: places.get(layer.split(".")[0], len(PARTS)))


def module_name(layer: str) -> str:
    """Name the module of a layer: down_blocks.0.resnets.1.conv1 -> down 0 · resnet 1; conv_in stays."""
    words = layer.split(".")
    part, *rest = words
    block = part.removesuffix("_blocks").removesuffix("_block")
    if block == part:
        return part.replace("_", " ")
    index = f" {rest.pop(0)}" if rest and rest[0].isdecimal() else ""
    if not rest or rest[0] not in KINDS:
        return f"{block}{index}"
    kind, number = rest[0].removesuffix("s"), rest[1] if len(rest) > 1 and rest[1].isdecimal() else ""
    return f"{block}{index} · {kind} {number}".rstrip()
