"""A dense UNet, its importance and params -> the plan: which channels are cut and which are kept."""

from collections.abc import Sequence

import click
import torch

from stages.models.families import Denoiser, family_name
from stages.models.groups import Group, find_groups
from stages.models.plan import Base, Plan, PlannedGroup, architecture_sha256
from stages.models.saliency import Importance
from stages.models.scores import KeptIndices, score_group
from stages.prune.budget import solve_budget
from stages.prune.kept import kept_to_layers, remove_channels
from stages.prune.params import Heads, PruneParams
from stages.prune.path import Cuts, choose_channels, find_path
from stages.prune.whole_groups import whole_groups_warning
from stages.prune.width_cost import WidthCost


def plan_pruning(unet: Denoiser, importance: Importance, params: PruneParams, seed: int = 0) -> Plan:
    """Choose the channels to cut from a dense UNet.

    Args:
        unet: The dense model; it is not changed.
        importance: Result of `measure_importance` for this model; it does not depend on the target.
        params: The block `prune` of params.yaml.
        seed: Seed of the scores of the criterion `random`.

    Raises:
        InputError: The target cannot be met, or a pattern matches no layer.
    """
    groups, draws = find_groups(unet), torch.Generator().manual_seed(seed)
    drawn = [torch.rand(group.width, generator=draws) for group in groups]
    dense = [score_group(group, importance, {}) for group in groups] if importance.saliency else drawn
    costs = WidthCost(unet, groups, heads=params.heads, latency_repeats=params.latency_repeats)
    path = find_path(groups, dense, params)
    counts, budget = solve_budget(params, path, groups, costs)
    if warning := whole_groups_warning(params, path, groups, counts):
        click.echo(f"Warning: {warning}", err=True)
    interleaved = params.order == "interleaved" and importance.saliency
    cuts, kept = _choose(unet, groups, counts, params.heads, importance if interleaved else None, dense)
    return Plan(
        base=Base(
            family=family_name(unet),
            architecture_sha256=architecture_sha256(unet),
            weights_sha256=importance.model_sha256,
        ),
        criterion=importance.criterion,
        formula=importance.formula,
        seed=seed,
        prune=params.model_dump(mode="json"),
        budget=budget,
        groups=[
            PlannedGroup(root=group.root, width=group.width, blocks=group.blocks, cut=cut.tolist())
            for group, cut in zip(groups, cuts, strict=True)
        ],
        layers=kept_to_layers(kept),
        heads=costs.num_heads(counts),
    ).sealed()


def _choose(
    unet: Denoiser,
    groups: Sequence[Group],
    counts: Cuts,
    heads: Heads,
    interleaved: Importance | None,
    scores: Sequence[torch.Tensor],
) -> tuple[list[torch.Tensor], KeptIndices]:
    """Choose `counts` channels of every group, by `scores` or by `interleaved` on the channels kept so far."""
    kept: KeptIndices = {}
    cuts = []
    for group, count, upfront in zip(groups, counts, scores, strict=True):
        current = score_group(group, interleaved, kept) if interleaved else upfront
        cuts.append(choose_channels(current, group, count, heads))
        remove_channels(kept, group, cuts[-1], unet)
    return cuts, kept
