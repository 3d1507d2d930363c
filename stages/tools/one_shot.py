"""A UNet, images and noise -> the plan, in one call: importance and selection without folders between them."""

from collections.abc import Sequence
from typing import Literal

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.importance.measure import Draw, measure_importance
from stages.models.families import Condition, Denoiser
from stages.models.params import CriterionName, FormulaName
from stages.models.plan import Plan
from stages.prune.params import PruneParams, Target
from stages.prune.selection import plan_pruning


def plan_one_shot(
    unet: Denoiser,
    scheduler: DDPMScheduler,
    images: torch.Tensor,
    noise: torch.Tensor,
    timesteps: Sequence[int],
    *,
    criterion: CriterionName = "diff-pruning",
    formula: FormulaName = "paper",
    threshold: float = 0.05,
    order: Literal["interleaved", "upfront"] = "interleaved",
    ratio: float = 0.3,
    seed: int = 0,
    condition: Condition | None = None,
) -> Plan:
    """Measure importance and choose the channels to cut, as either of the original's engines does.

    Args:
        unet: A dense UNet; it stays as it is. `stages.prune.surgery.cut(unet, plan)` gives the smaller one.
        scheduler: The noise schedule that it was trained with.
        images: x₀, [B, C, H, W] in [-1, 1].
        noise: ε of that shape; it serves all timesteps.
        timesteps: Ascending.
        criterion: random, magnitude, taylor, diff-pruning, no-cancel-taylor, fisher or snr-taylor.
        formula: paper is the original's ddpm_exp, diffusers its ddpm_prune.py.
        threshold: T, where the sum over the timesteps ends.
        order: interleaved scores a group on what the groups before it have left, as the original does.
        ratio: Share of channels to cut from every group.
        seed: Of the scores of random.
        condition: What a conditional model takes beside image and timestep, by the names of its forward.

    Returns:
        The plan: `plan.groups` in the order of the original, each with the channels that go.
    """
    importance = measure_importance(
        unet,
        scheduler,
        [Draw(images, noise, condition or {})],
        timesteps,
        criterion=criterion,
        formula=formula,
        threshold=threshold,
    )
    return plan_pruning(unet, importance, PruneParams(target=Target(ratio=ratio), order=order), seed)
