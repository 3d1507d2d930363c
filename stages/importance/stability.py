"""Fresh batches and noise -> how far the importance can be trusted: where it comes from, what cancels, what repeats."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import nn

from stages.data.images import Images
from stages.importance.calibration import draw_calibration
from stages.importance.criteria import CRITERIA
from stages.importance.measure import Draw, measure_importance
from stages.importance.params import ImportanceParams
from stages.models.families import Denoiser
from stages.models.groups import Group, find_groups
from stages.models.saliency import Importance
from stages.models.scores import score_group
from stages.runtime.progress import track
from stages.runtime.seeds import derive_seed

REFERENCE_RATIO = 0.3
"""The cut sets that are compared are the lowest 30 % of every group."""


@dataclass(frozen=True)
class Heat:
    """Where the first-order change of the loss comes from."""

    timesteps: list[int]
    layers: list[str]
    contribution: NDArray[np.float64]
    """Σ |w·g_t| over a layer's weights: [layers, timesteps]."""
    cancellation: NDArray[np.float64]
    """1 − Σ |Σ_t w·g_t| / Σ Σ_t |w·g_t|: the share of a layer's contributions that signs take away: [layers]."""


@dataclass(frozen=True)
class Stability:
    """How alike the rankings of fresh draws are: mean over pairs of draws and over groups, weighted by width."""

    spearman: float
    """Rank correlation of the channels' scores."""
    overlap: float
    """Share of the lowest 30 % that two draws have in common; .3 is chance."""


def measure_reliability(
    importance: Importance,
    unet: Denoiser,
    scheduler: DDPMScheduler,
    images: Images,
    params: ImportanceParams,
    seed: int,
) -> tuple[Heat | None, Stability | None]:
    """Measure both where there is anything to judge: random and magnitude need no data and never change."""
    if params.report is None or not CRITERIA[importance.criterion].gradients or not all(importance.losses):
        return None, None
    timesteps = spaced(importance, params.report.timesteps)
    heat = measure_heat(unet, scheduler, next(draw_calibration(unet, images, params, seed)), timesteps)
    return heat, measure_stability(unet, scheduler, images, params, timesteps, params.report.draws, seed)


def measure_heat(unet: Denoiser, scheduler: DDPMScheduler, draw: Draw, timesteps: Sequence[int]) -> Heat:
    """Look at timesteps one at a time, on one draw."""
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    signed = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    absolute = np.zeros((len(layers), len(timesteps)))
    for column, timestep in enumerate(track(timesteps, "heat, timestep", len(timesteps))):
        found = measure_importance(
            unet, scheduler, [draw], [timestep], criterion="taylor", formula="diffusers", label=None
        )
        for row, name in enumerate(layers):
            signed[name] += found.saliency[name].to(unet.device)
            absolute[row, column] = found.saliency[name].abs().sum()
    left = np.array([float(signed[name].abs().sum()) for name in layers])
    total = absolute.sum(axis=1)
    cancelled = 1 - np.divide(left, total, out=np.ones_like(left), where=total > 0)
    return Heat(list(timesteps), list(layers), absolute, cancelled)


def measure_stability(
    unet: Denoiser,
    scheduler: DDPMScheduler,
    images: Images,
    params: ImportanceParams,
    timesteps: Sequence[int],
    num_draws: int,
    seed: int,
) -> Stability | None:
    """Measure the importance anew on fresh images and noise, at few timesteps, and compare the rankings."""
    single = params.model_copy(update={"batches": 1, "noises": 1})
    groups = find_groups(unet)
    scores = []
    for index in range(num_draws):
        draws = draw_calibration(unet, images, single, derive_seed(seed, "stability", index))
        importance = measure_importance(
            unet,
            scheduler,
            draws,
            timesteps,
            criterion=params.criterion,
            formula=params.formula,
            timesteps_per_pass=params.timesteps_per_pass,
            precision=params.precision,
            label="stability",
        )
        scores.append([score_group(group, importance, {}) for group in groups])
    return compare_rankings(groups, scores)


def compare_rankings(groups: Sequence[Group], scores: Sequence[Sequence[torch.Tensor]]) -> Stability | None:
    """[draws][groups] scores -> how alike their rankings are, None if no group's scores differ from each other."""
    rows = [
        (group.width, *_agree(one[index], two[index]))
        for one, two in itertools.combinations(scores, 2)
        for index, group in enumerate(groups)
        if one[index].unique().numel() > 1 and two[index].unique().numel() > 1
    ]
    if not rows:
        return None
    weights = [row[0] for row in rows]
    return Stability(*(fmean((row[column] for row in rows), weights) for column in (1, 2)))


def _agree(one: torch.Tensor, two: torch.Tensor) -> tuple[float, float]:
    num_cut = max(1, int(len(one) * REFERENCE_RATIO))
    lowest = [set(scores.argsort(stable=True)[:num_cut].tolist()) for scores in (one, two)]
    return float(spearmanr(one.numpy(), two.numpy()).statistic), len(lowest[0] & lowest[1]) / num_cut


def spaced(importance: Importance, count: int) -> list[int]:
    """Take that many timesteps, evenly spaced, of those that counted in every draw."""
    used = importance.timesteps[: min(len(losses) for losses in importance.losses)]
    places = np.linspace(0, len(used) - 1, min(count, len(used))).round().astype(int)
    return [used[place] for place in dict.fromkeys(places.tolist())]
