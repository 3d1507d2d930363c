"""A denoiser, images and noise -> the pruning plan in one call: importance and selection without folders between."""

from collections.abc import Sequence
from typing import Literal

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.importance.measure import CalibrationBatch, measure_importance
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
    """Measure importance and choose the channels to prune, as one of the programs of Fang et al. (2023) does.

    Args:
        unet: A dense denoiser; it is not changed. `stages.prune.surgery.cut(unet, plan)` prunes it.
        scheduler: The noise schedule of its training.
        images: x₀, [B, C, H, W] in [-1, 1].
        noise: ε, of the shape of `images`; the same for all timesteps.
        timesteps: Ascending.
        criterion: random, magnitude, taylor, diff-pruning, no-cancel-taylor, fisher or snr-taylor.
        formula: Of the original, paper: ddpm_exp; diffusers: ddpm_prune.py; ldm: ldm_exp, but on the given images.
        threshold: T: the sum over timesteps ends where the loss falls below this share of its maximum.
        order: interleaved scores each group after the groups before it were pruned, as the original does; upfront
            scores all groups on the dense model.
        ratio: Share of channels to prune from every group.
        seed: Seed of the scores of criterion random.
        condition: Further arguments of a conditional model's forward, by name; None for an unconditional model.

    Returns:
        The plan: `plan.groups` in the order of the original, each with the channels to prune.
    """
    batches = [CalibrationBatch(images, noise, condition or {})]
    importance = measure_importance(
        unet, scheduler, batches, timesteps, criterion=criterion, formula=formula, threshold=threshold
    )
    return plan_pruning(unet, importance, PruneParams(target=Target(ratio=ratio), order=order), seed)
