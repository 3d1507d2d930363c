"""Params, a model and its importance -> the pruned model and its plan."""

import click
import torch
from torch import nn

from stages.artifacts import Importance, tensors_sha256
from stages.diffusion.cost import count_macs, count_params
from stages.diffusion.families import Denoiser
from stages.errors import InputError
from stages.params import PruneParams
from stages.prune.plan import Plan
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.seeds import derive_seed


def prune_unet(unet: Denoiser, importance: Importance, params: PruneParams, seed: int) -> tuple[Denoiser, Plan]:
    """Choose, cut, prove, and say what came of it.

    Raises:
        InputError: The ratio leaves a group empty, or the importance is damaged or that of another model.
    """
    check_importance(importance, unet)
    plan = plan_pruning(unet, importance, params, derive_seed(seed, "random importance"))
    pruned = cut(unet, plan)
    for unit, count, scale in (("M parameters", count_params, 1e6), ("G MACs", count_macs, 1e9)):
        before, after = count(unet), count(pruned)
        click.echo(f"{before / scale:.4f} -> {after / scale:.4f} {unit} ({after / before - 1:+.1%})")
    return pruned, plan


def check_importance(importance: Importance, unet: Denoiser) -> None:
    """Make sure that there is one finite number for each weight of this model.

    Raises:
        InputError: The importance is that of another model, or damaged.
    """
    if importance.model_sha256 != tensors_sha256(unet.state_dict()):
        raise InputError("the importance was measured on another model; run the importance stage on this one")
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    expected = {} if importance.criterion == "random" else {name: layer.weight.shape for name, layer in layers.items()}
    found = {name: values.shape for name, values in importance.saliency.items() if name in layers}
    finite = all(values.dtype == torch.float32 and values.isfinite().all() for values in importance.saliency.values())
    if found != expected or not finite:
        raise InputError(
            "the saliencies do not cover the model's weights or are not finite; run the importance stage again"
        )
