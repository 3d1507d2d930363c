"""A model and names of residual branches -> the model with their shortcuts alone; needs no torch-pruning."""

import copy
from collections.abc import Iterable

from stages.models.families import Denoiser, family_of
from stages.models.pruned_unet import replace_module


def bypass(unet: Denoiser, names: Iterable[str]) -> Denoiser:
    """Replace the modules of residual branches by their shortcuts, in place."""
    for name in names:
        replace_module(unet, name, family_of(unet).shortcut(unet.get_submodule(name)))
    return unet


def bypassed(unet: Denoiser) -> list[str]:
    """Name the modules of a model that are shortcuts alone."""
    return [name for name, module in unet.named_modules() if isinstance(module, family_of(unet).shortcut)]


def without_branches(unet: Denoiser, names: Iterable[str]) -> Denoiser:
    """Copy a model without some branches; the copy has the model's own tensors. Return the model if there are none."""
    names, shared = list(names), {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    return bypass(copy.deepcopy(unet, shared), names) if names else unet
