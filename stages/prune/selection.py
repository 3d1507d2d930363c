"""A dense UNet, its importance and params -> the plan: which channels go and which stay."""

from collections.abc import Sequence

import torch

from stages.models.families import Denoiser, family_name
from stages.models.groups import Group, find_groups
from stages.models.plan import Base, Plan, PlannedGroup, architecture_sha256
from stages.models.saliency import Importance
from stages.models.scores import KeptIndices, score_group
from stages.prune.budget import solve_budget
from stages.prune.kept import kept_to_layers, remove
from stages.prune.params import PruneParams
from stages.prune.path import Cuts, choose, find_path
from stages.prune.width_cost import Costs


def plan_pruning(unet: Denoiser, importance: Importance, params: PruneParams, seed: int = 0) -> Plan:
    """Choose the channels to cut from a dense UNet.

    Args:
        unet: The dense model; it is only looked at.
        importance: What `measure_importance` found for this model; it serves every target.
        params: How much is cut, and where.
        seed: For the scores of the criterion random.

    Raises:
        InputError: The target cannot be met, or a pattern matches nothing.
    """
    groups, draws = find_groups(unet), torch.Generator().manual_seed(seed)
    drawn = [torch.rand(group.width, generator=draws) for group in groups]
    dense = [score_group(group, importance, {}) for group in groups] if importance.saliency else drawn
    costs = Costs(unet, groups, heads=params.heads, latency_repeats=params.latency_repeats)
    counts, budget = solve_budget(params, find_path(groups, dense, params), groups, costs)
    interleaved = params.order == "interleaved" and importance.saliency
    cuts, kept = _choose(unet, groups, counts, params, importance if interleaved else None, dense)
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
    params: PruneParams,
    interleaved: Importance | None,
    scores: Sequence[torch.Tensor],
) -> tuple[list[torch.Tensor], KeptIndices]:
    """Choose that many channels of every group: by `scores`, or scored anew on what the groups before have left."""
    kept: KeptIndices = {}
    cuts = []
    for group, count, upfront in zip(groups, counts, scores, strict=True):
        current = score_group(group, interleaved, kept) if interleaved else upfront
        cuts.append(choose(current, group, count, params))
        remove(kept, group, cuts[-1], unet)
    return cuts, kept
