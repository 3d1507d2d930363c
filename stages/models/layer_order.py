"""Names of a model's layers -> the order in which they run, and the module that each belongs to."""

from collections.abc import Iterable

from stages.models.families import FAMILIES

FAMILY_OF_PART = {part: family for family in FAMILIES.values() for part in family.parts}
"""Module at the top of a model -> a family with such a module."""
LAST = max(len(family.parts) for family in FAMILIES.values())


def in_run_order(layers: Iterable[str]) -> list[str]:
    """Order layers by the part of the model that they belong to; inside a part they stay as they are."""
    return sorted(layers, key=_place)


def _place(layer: str) -> int:
    part = layer.split(".", maxsplit=1)[0]
    return FAMILY_OF_PART[part].parts.index(part) if part in FAMILY_OF_PART else LAST


def module_name(layer: str) -> str:
    """Name the module of a layer: down_blocks.0.resnets.1.conv1 -> down 0 · resnet 1; conv_in stays."""
    part = layer.split(".", maxsplit=1)[0]
    return FAMILY_OF_PART[part].module_name(layer) if part in FAMILY_OF_PART else part.replace("_", " ")
