"""Params, a model and its importance (or an existing plan) -> the pruned model and its plan."""

from collections.abc import Callable
from pathlib import Path

import click
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from stages.data.images import Images
from stages.models.checks import read_fitting_images
from stages.models.complexity import count_macs, count_params
from stages.models.families import Denoiser
from stages.models.groups import weighted_layers
from stages.models.params import Quantity
from stages.models.plan import Plan, read_plan, show_cost
from stages.models.saliency import Importance, read_importance
from stages.prune.calibration import CalibrationBatches
from stages.prune.compensate import NoisyBatches, compensate, difference
from stages.prune.depth import plan_depth
from stages.prune.kept import check_plan
from stages.prune.params import CompensateParams, DepthParams, PruneParams
from stages.prune.selection import plan_pruning
from stages.prune.surgery import cut
from stages.runtime.errors import InputError
from stages.runtime.schema import validate_tree
from stages.runtime.seeds import derive_seed
from stages.storage.tensors import tensors_sha256


def make_plan(
    unet: Denoiser,
    importance: Path | None,
    plan: Path | None,
    params: PruneParams,
    seed: int,
    earlier: Plan | None = None,
    batches: CalibrationBatches | None = None,
) -> Plan:
    """Make a plan from the importance, or replay an existing one.

    `earlier` is the plan of a model pruned before, and `batches` are the images on which prune.depth chooses.

    Raises:
        InputError: Both or neither are given, the file is damaged or for another model, or the target cannot be met.
    """
    if importance is not None and plan is None:
        found = read_importance(importance)
        check_importance(found, unet)
        made = _plan(unet, found, params, derive_seed(seed, "random importance"), earlier, batches)
        click.echo(made.budget.line())
        return made
    if plan is not None and importance is None:
        return replay(read_plan(plan), unet, params.compensate)
    raise InputError("give either --importance, to make a plan, or --replay, to apply an existing one")


def _plan(
    unet: Denoiser,
    importance: Importance,
    params: PruneParams,
    seed: int,
    earlier: Plan | None,
    batches: CalibrationBatches | None,
) -> Plan:
    """Plan a cut, with or without the removal of branches.

    Raises:
        InputError: The target cannot be met, or branches would be removed from a model that was pruned before.
    """
    if params.depth is None:
        return plan_pruning(unet, importance, params, seed, earlier)
    if earlier is not None:
        found = "prune.depth is set, and the model was pruned before; only the first cut can remove branches"
        raise InputError(f"{found}; set it to null")
    return plan_depth(unet, importance, params, seed, batches)


def replay(plan: Plan, unet: Denoiser, compensate: CompensateParams | None = None) -> Plan:
    """Apply a plan to another checkpoint of the same architecture: the same channels, with this compensation.

    A plan that cuts no channel has none.

    Raises:
        InputError: The plan is for another architecture, or contradicts itself.
    """
    check_plan(plan, unet)
    base = plan.base.model_copy(update={"weights_sha256": tensors_sha256(unet.state_dict())})
    if not any(group.cut for group in plan.groups):
        compensate = None
    params = validate_tree(plan.prune, PruneParams, "the plan's prune").model_copy(update={"compensate": compensate})
    changes = {"base": base, "prune": params.model_dump(mode="json"), "replayed_from": plan.sha256}
    return plan.model_copy(update=changes).sealed()


def read_calibration(
    unet: Denoiser, scheduler: DDPMScheduler, data: Path | None, params: CompensateParams | None, seed: int
) -> NoisyBatches | None:
    """Open the calibration images of the compensation; None without compensation.

    Raises:
        InputError: The images are missing, too few, or do not fit the model.
    """
    if data is not None and not data.is_dir():
        raise InputError(f"--data {data} is not a folder; give the packed images that the fetch stage writes")
    if params is None:
        return None
    return NoisyBatches(unet, scheduler, _read_images(unet, data, "prune.compensate"), params, seed)


def read_depth_calibration(
    unet: Denoiser, scheduler: DDPMScheduler, data: Path | None, params: DepthParams | None, seed: int
) -> CalibrationBatches | None:
    """Open the calibration images of prune.depth; None where it needs none.

    Raises:
        InputError: The images are missing, too few, or do not fit the model.
    """
    if params is None or not params.needs_images:
        return None
    images = _read_images(unet, data, "prune.depth")
    return CalibrationBatches(unet, scheduler, images, params, seed, purpose="depth", key="prune.depth")


def _read_images(unet: Denoiser, data: Path | None, key: str) -> Images:
    """Read packed images that fit the model.

    Raises:
        InputError: There are none, or they do not fit.
    """
    if data is None:
        raise InputError(f"{key} needs calibration images; give them with --data")
    return read_fitting_images(data, unet)


def prune_unet(unet: Denoiser, plan: Plan, images: NoisyBatches | None) -> Denoiser:
    """Cut as planned, compensate if there are images, and print the costs before and after.

    Raises:
        InputError: The compensated model is farther from the dense model on other images than the cut one.
    """
    pruned = cut(unet, plan)
    counts: dict[Quantity, Callable[[Denoiser], int]] = {"params": count_params, "macs": count_macs}
    for quantity, count in counts.items():
        before, after = count(unet), count(pruned)
        click.echo(f"{show_cost(quantity, before)} -> {show_cost(quantity, after)} ({after / before - 1:+.1%})")
    if images is not None and not any(group.cut for group in plan.groups):
        click.echo("nothing to compensate: no channel is cut")
    elif images is not None:
        gap = difference(unet, pruned, images.held_out, images.weigh)
        compensate(unet, pruned, plan, images, images.params, images.weigh)
        remaining = difference(unet, pruned, images.held_out, images.weigh)
        found = f"mean square difference from the dense prediction {gap:.3g} -> {remaining:.3g}"
        if not remaining <= gap:
            advice = "raise its damping, num_images or num_timesteps, or set it to null"
            raise InputError(f"prune.compensate does harm: {found} on held-out images; {advice}")
        click.echo(f"compensated: {found} on held-out images and timesteps")
    return pruned


def check_importance(importance: Importance, unet: Denoiser) -> None:
    """Check that the importance has one finite number for each weight of this model.

    Raises:
        InputError: The importance is for another model, or damaged.
    """
    if importance.model_sha256 != tensors_sha256(unet.state_dict()):
        raise InputError("the importance was measured on another model; run the importance stage on this one")
    layers = weighted_layers(unet)
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
