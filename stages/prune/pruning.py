"""Params, a model and its importance (or a plan made before) -> the pruned model and its plan."""

from pathlib import Path

import click
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray
from torch import nn

from stages.artifacts import Importance, read_importance, tensors_sha256
from stages.diffusion.cost import count_macs, count_params
from stages.diffusion.families import Denoiser
from stages.errors import InputError
from stages.params import PruneParams
from stages.prune.compensate import compensate, difference, draw_noisy
from stages.prune.plan import Plan, check_plan, read_plan
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.seeds import derive_seed


def prepare(unet: Denoiser, importance: Path | None, plan: Path | None, params: PruneParams, seed: int) -> Plan:
    """Make the plan from the importance, or take one over.

    Raises:
        InputError: Not exactly one of both is given, it is damaged or of another model, or the target cannot be met.
    """
    if importance is not None and plan is None:
        found = read_importance(importance)
        check_importance(found, unet)
        made = plan_pruning(unet, found, params, derive_seed(seed, "random importance"))
        click.echo(made.budget.line())
        return made
    if plan is not None and importance is None:
        return replay(read_plan(plan), unet)
    raise InputError("give either --importance, to make a plan, or --replay, to carry one out")


def replay(plan: Plan, unet: Denoiser) -> Plan:
    """Take a plan over to another checkpoint of the same architecture: the same channels go.

    Raises:
        InputError: It was made for another architecture, or contradicts itself.
    """
    check_plan(plan, unet)
    base = plan.base.model_copy(update={"weights_sha256": tensors_sha256(unet.state_dict())})
    return plan.model_copy(update={"base": base, "replayed_from": plan.sha256}).sealed()


def prune_unet(
    unet: Denoiser, scheduler: DDPMScheduler, plan: Plan, pixels: NDArray[np.uint8] | None, seed: int
) -> Denoiser:
    """Cut as planned, prove it, compensate where the plan says so, and say what came of it.

    Raises:
        InputError: The plan compensates and there are no images to do it with.
    """
    pruned = cut(unet, plan)
    for unit, count, scale in (("M parameters", count_params, 1e6), ("G MACs", count_macs, 1e9)):
        before, after = count(unet), count(pruned)
        click.echo(f"{before / scale:.4f} -> {after / scale:.4f} {unit} ({after / before - 1:+.1%})")
    if (params := plan.prune.compensate) is not None:
        if pixels is None:
            raise InputError("prune.compensate needs calibration images; give them with --data")
        batches = list(draw_noisy(unet, scheduler, pixels, params, seed))
        gap = difference(unet, pruned, batches)
        compensate(unet, pruned, plan, batches, params)
        left = difference(unet, pruned, batches)
        click.echo(f"compensated: mean square difference from the dense prediction {gap:.3g} -> {left:.3g}")
    return pruned


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
