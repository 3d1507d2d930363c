"""Independent calibration batches -> diagnostics of the importance: its origin, cancellation and stability."""

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
from stages.importance.calibration import calibration_draws
from stages.importance.criteria import CRITERIA
from stages.importance.measure import CalibrationDraw, measure_importance
from stages.importance.ordered_sum import OrderedSum
from stages.importance.params import ImportanceParams
from stages.models.families import Denoiser
from stages.models.groups import Group, find_groups
from stages.models.saliency import Importance
from stages.models.scores import score_group
from stages.runtime.processes import Processes
from stages.runtime.progress import track
from stages.runtime.seeds import derive_seed

REFERENCE_RATIO = 0.3
"""Share of a group's channels, those of the lowest scores, whose overlap is measured."""


@dataclass(frozen=True)
class Heatmap:
    """Contribution of each layer at each timestep to the first-order change of the loss."""

    timesteps: list[int]
    layers: list[str]
    contribution: NDArray[np.float64]
    """[layers, timesteps]: Σ |w·g_t| over a layer's weights."""
    cancellation: NDArray[np.float64]
    """[layers]: 1 − Σ |Σ_t w·g_t| / Σ Σ_t |w·g_t|, the share of a layer's contributions that cancels over time."""


@dataclass(frozen=True)
class RankingStability:
    """Agreement of rankings from independent batches: mean over pairs and groups, weighted by width."""

    spearman: float
    """Rank correlation of the channels' scores, in [−1, 1]."""
    overlap: float
    """Share of the lowest 30 % that two rankings have in common; 0.3 for random rankings."""


def measure_diagnostics(
    importance: Importance,
    unet: Denoiser,
    scheduler: DDPMScheduler,
    images: Images,
    params: ImportanceParams,
    seed: int,
    processes: Processes | None = None,
) -> tuple[Heatmap | None, RankingStability | None]:
    """Measure both; None for random and magnitude, which use no data, and for params without `report`."""
    if params.report is None or not CRITERIA[importance.criterion].needs_gradients or not all(importance.losses):
        return None, None
    timesteps = evenly_spaced_timesteps(importance, params.report.timesteps)
    processes = processes or Processes(next(unet.parameters()).device)
    batch, known = next(calibration_draws(unet, scheduler, images, params, seed)), importance.model_sha256
    heatmap = measure_heatmap(unet, scheduler, batch, timesteps, known, processes=processes)
    num_draws = params.report.draws
    return heatmap, measure_stability(
        unet, scheduler, images, params, timesteps, num_draws, seed, known, processes=processes
    )


def measure_heatmap(
    unet: Denoiser,
    scheduler: DDPMScheduler,
    batch: CalibrationDraw,
    timesteps: Sequence[int],
    model_sha256: str | None = None,
    *,
    processes: Processes | None = None,
) -> Heatmap:
    """Measure w·g_t on one batch, one timestep at a time; processes share the timesteps."""
    processes = processes or Processes(next(unet.parameters()).device)
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    signed, absolute = OrderedSum(processes), np.zeros((len(layers), len(timesteps)))
    device = unet.device  # diffusers walks through all modules for it
    starts = range(0, len(timesteps), processes.count)
    for start in track(starts, "heatmap, timestep", len(starts)):
        chunk = timesteps[start : start + processes.count]
        own: list[torch.Tensor] = []
        if processes.index < len(chunk):
            found = measure_importance(
                unet,
                scheduler,
                [batch],
                [chunk[processes.index]],
                criterion="taylor",
                formula="diffusers",
                label=None,
                model_sha256=model_sha256,
            )
            own = [found.saliency[name].to(device) for name in layers]
        sums = processes.gather(
            [float(found.saliency[name].abs().sum()) for name in layers] if own else [0.0] * len(layers)
        )
        signed.add(own, range(len(chunk)))
        absolute[:, start : start + len(chunk)] = np.transpose(sums[: len(chunk)])
    totals = signed.result([torch.zeros_like(layer.weight) for layer in layers.values()])
    remaining = np.array([float(total.abs().sum()) for total in totals])
    total = absolute.sum(axis=1)
    cancelled = 1 - np.divide(remaining, total, out=np.ones_like(remaining), where=total > 0)
    return Heatmap(list(timesteps), list(layers), absolute, cancelled)


def measure_stability(
    unet: Denoiser,
    scheduler: DDPMScheduler,
    images: Images,
    params: ImportanceParams,
    timesteps: Sequence[int],
    num_draws: int,
    seed: int,
    model_sha256: str | None = None,
    *,
    processes: Processes | None = None,
) -> RankingStability | None:
    """Measure the importance again on independent images and noise, at few timesteps, and compare the rankings."""
    single = params.model_copy(update={"batches": 1, "noises": 1})
    groups = find_groups(unet)
    scores = []
    for index in range(num_draws):
        batches = calibration_draws(unet, scheduler, images, single, derive_seed(seed, "stability", index))
        importance = measure_importance(
            unet,
            scheduler,
            batches,
            timesteps,
            criterion=params.criterion,
            formula=params.formula,
            timesteps_per_pass=params.timesteps_per_pass,
            precision=params.precision,
            label="stability",
            model_sha256=model_sha256,
            processes=processes,
        )
        scores.append([score_group(group, importance, {}) for group in groups])
    return compare_rankings(groups, scores)


def compare_rankings(groups: Sequence[Group], scores: Sequence[Sequence[torch.Tensor]]) -> RankingStability | None:
    """Scores, by draw and group -> the agreement of their rankings; None if all scores within each group are equal."""
    rows = [
        (group.width, *_compare_pair(one[index], two[index]))
        for one, two in itertools.combinations(scores, 2)
        for index, group in enumerate(groups)
        if one[index].unique().numel() > 1 and two[index].unique().numel() > 1
    ]
    if not rows:
        return None
    weights = [row[0] for row in rows]
    return RankingStability(*(fmean((row[column] for row in rows), weights) for column in (1, 2)))


def _compare_pair(one: torch.Tensor, two: torch.Tensor) -> tuple[float, float]:
    """Compute the rank correlation and the overlap of two scores of one group."""
    num_cut = max(1, int(len(one) * REFERENCE_RATIO))
    lowest = [set(scores.argsort(stable=True)[:num_cut].tolist()) for scores in (one, two)]
    return float(spearmanr(one.numpy(), two.numpy()).statistic), len(lowest[0] & lowest[1]) / num_cut


def evenly_spaced_timesteps(importance: Importance, count: int) -> list[int]:
    """Select at most `count` timesteps, evenly spaced, from those that every batch used."""
    used = importance.timesteps[: min(len(losses) for losses in importance.losses)]
    places = np.linspace(0, len(used) - 1, min(count, len(used))).round().astype(int)
    return [used[place] for place in dict.fromkeys(places.tolist())]
