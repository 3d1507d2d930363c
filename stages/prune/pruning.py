"""Params, a model and its importance (or a plan made before) -> the pruned model and its plan."""

from collections.abc import Callable
from pathlib import Path

import click
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from stages.data.images import read_images
from stages.models.complexity import count_macs, count_params
from stages.models.families import Denoiser, sample_shape
from stages.models.params import Quantity
from stages.models.pipeline import check_conditions, check_images
from stages.models.plan import Plan, read_plan, show_cost
from stages.models.pruned_unet import Layers
from stages.models.saliency import Importance, read_importance
from stages.prune.compensate import NoisyImages, compensate, difference
from stages.prune.kept import check_plan
from stages.prune.params import CompensateParams, PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.runtime.errors import InputError
from stages.runtime.schema import validate_tree
from stages.runtime.seeds import derive_seed
from stages.storage.tensors import tensors_sha256


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
        return replay(read_plan(plan), unet, params.compensate)
    raise InputError("give either --importance, to make a plan, or --replay, to carry one out")


def replay(plan: Plan, unet: Denoiser, compensate: CompensateParams | None = None) -> Plan:
    """Take a plan over to another checkpoint of the same architecture: the same channels go, compensated as said now.

    Raises:
        InputError: It was made for another architecture, or contradicts itself.
    """
    check_plan(plan, unet)
    base = plan.base.model_copy(update={"weights_sha256": tensors_sha256(unet.state_dict())})
    params = validate_tree(plan.prune, PruneParams, "the plan's prune").model_copy(update={"compensate": compensate})
    changes = {"base": base, "prune": params.model_dump(mode="json"), "replayed_from": plan.sha256}
    return plan.model_copy(update=changes).sealed()


def calibration(
    unet: Denoiser, scheduler: DDPMScheduler, data: Path | None, params: PruneParams, seed: int
) -> NoisyImages | None:
    """Open the images that compensation needs, before anything dear is done.

    Raises:
        InputError: There are none, too few, or they are not for this model.
    """
    if data is not None and not data.is_dir():
        raise InputError(f"--data {data} is no folder; give packed images, as the fetch stage writes them")
    if params.compensate is None:
        return None
    if data is None:
        raise InputError("prune.compensate needs calibration images; give them with --data")
    images = read_images(data)
    check_conditions(unet, images.conditions, data)
    check_images(images.train, sample_shape(unet), data)
    return NoisyImages(unet, scheduler, images, params.compensate, seed)


def prune_unet(unet: Denoiser, plan: Plan, images: NoisyImages | None) -> Denoiser:
    """Cut as planned, prove it, compensate where the plan says so and it helps, and say what came of it."""
    pruned = cut(unet, plan)
    counts: dict[Quantity, Callable[[Denoiser], int]] = {"params": count_params, "macs": count_macs}
    for quantity, count in counts.items():
        before, after = count(unet), count(pruned)
        click.echo(f"{show_cost(quantity, before)} -> {show_cost(quantity, after)} ({after / before - 1:+.1%})")
    if images is not None:
        gap = difference(unet, pruned, images)
        compensate(unet, pruned, plan, images, images.params)
        left = difference(unet, pruned, images)
        click.echo(f"compensated: mean square difference from the dense prediction {gap:.3g} -> {left:.3g}")
        if not left < gap:
            click.echo("Warning: that is no closer, so the weights stay as they were cut", err=True)
            return cut(unet, plan)
    return pruned


def check_importance(importance: Importance, unet: Denoiser) -> None:
    """Make sure that there is one finite number for each weight of this model.

    Raises:
        InputError: The importance is that of another model, or damaged.
    """
    if importance.model_sha256 != tensors_sha256(unet.state_dict()):
        raise InputError("the importance was measured on another model; run the importance stage on this one")
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, Layers)}
    shapes = {name: layer.weight.shape for name, layer in layers.items()}
    scored = {name for name, layer in layers.items() if isinstance(layer, nn.Conv2d | nn.Linear)}
    found = {name: values.shape for name, values in importance.saliency.items()}
    if importance.criterion == "random":
        scored = set()
    expected = {name: shapes.get(name) for name in {*scored, *found}}
    finite = all(values.dtype == torch.float32 and values.isfinite().all() for values in importance.saliency.values())
    random = importance.criterion == "random" and importance.saliency
    if found != expected or not finite or random:
        raise InputError(
            "the saliencies do not cover the model's weights or are not finite; run the importance stage again"
        )
