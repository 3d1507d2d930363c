"""A dense denoiser, its importance and params -> the plan: which channels are cut and which are kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import click
import torch

from stages.models.branches import record_removal
from stages.models.families import Denoiser, family_name
from stages.models.groups import Group, find_groups
from stages.models.latency import SteadyClock
from stages.models.plan import Base, Budget, Plan, PlannedGroup, architecture_sha256, version_of
from stages.models.saliency import Importance
from stages.models.scores import KeptIndices
from stages.models.shortcuts import without_branches
from stages.prune.budget import solve_budget
from stages.prune.depth_cost import DepthCost
from stages.prune.earlier import after_cuts, dense_cost, dense_model
from stages.prune.halves import choose_pairs, find_gated
from stages.prune.kept import kept_to_layers, remove_channels
from stages.prune.params import PruneParams
from stages.prune.path import (
    Cuts,
    NoGroupError,
    Step,
    choose_channels,
    choose_groups,
    cuts_after,
    find_path,
    removes_heads,
)
from stages.prune.ranking import Ranking
from stages.prune.whole_groups import whole_groups_warning
from stages.prune.width_cost import WidthCost
from stages.runtime.errors import InputError


@dataclass(frozen=True)
class SearchSpace:
    """What a plan chooses from."""

    groups: Sequence[Group]
    """The groups of channels that are cut together."""
    params: PruneParams
    """The block prune, with the patterns that match a layer of these groups."""
    ranking: Ranking
    costs: WidthCost
    dense: float | None
    """The cost that the target is a share of; None: that of the model whose channels are cut."""

    def path(self) -> list[Step]:
        """Order all cuts of channels that `params` allows, the least important first."""
        scores = [self.ranking.channels(index, {}) for index in range(len(self.groups))]
        return find_path(self.groups, scores, self.params)


def plan_pruning(
    unet: Denoiser,
    importance: Importance,
    params: PruneParams,
    seed: int = 0,
    earlier: Plan | None = None,
    *,
    removed: Sequence[str] = (),
    budget: Budget | None = None,
    depth: DepthCost | None = None,
) -> Plan:
    """Choose the channels to cut from a denoiser; the plan is of this cut alone, numbered as in `unet`.

    Args:
        unet: The model; it is not changed.
        importance: Result of `measure_importance` for this model; it does not depend on the target.
        params: The block `prune` of params.yaml.
        seed: Seed of the scores of the criterion `random`.
        earlier: The plan by which the model was cut from a dense one, whose size the target is a share of.
        removed: Residual branches that are removed first; they can all go.
        budget: The cost without these branches, if they alone meet the target and no channel is cut; else None.
        depth: The cost of the dense model, of which a target is a share; None: it is measured, if it is needed.

    Raises:
        InputError: The target cannot be met, or a pattern matches no layer.
    """
    if removed and not budget and params.target.ratio is None:
        depth = depth or DepthCost(unet, params)
    space = _open_space(unet, importance, params, seed, earlier=earlier, removed=removed, depth=depth)
    if budget:
        counts = [0] * len(space.groups)
    else:
        counts, budget = _solve(space)
    cuts, kept = _choose(unet, counts, space.ranking, params)
    counts = [len(cut) for cut in cuts]
    if space.ranking.gated:
        found = space.costs.channels(counts)
        budget = budget.model_copy(update={"found": found, "smallest": min(budget.smallest, found)})
    branches = record_removal(unet, removed)
    return Plan(
        version=version_of(branches),
        base=_base(unet, importance),
        criterion=importance.criterion,
        formula=importance.formula,
        seed=seed,
        prune=params.model_dump(mode="json"),
        budget=budget,
        groups=_plan_groups(space.groups, cuts),
        layers=kept_to_layers(kept),
        heads=space.costs.num_heads(counts),
        removed=branches,
    ).sealed()


def smallest_cost(unet: Denoiser, importance: Importance, params: PruneParams, seed: int, depth: DepthCost) -> float:
    """Compute the cost without as many branches as can go and after every cut of channels that `params` allows."""
    removed = depth.dearest()
    space = _open_space(unet, importance, params, seed, removed=removed, depth=depth)
    try:
        path = space.path()
    except NoGroupError:  # all that could be cut is in these branches
        return depth.without(removed)
    cost = getattr(space.costs, params.target.quantity)
    return float(cost(cuts_after(path, len(space.groups))))


def _open_space(
    unet: Denoiser,
    importance: Importance,
    params: PruneParams,
    seed: int,
    *,
    earlier: Plan | None = None,
    removed: Sequence[str] = (),
    depth: DepthCost | None = None,
) -> SearchSpace:
    """Find the groups of a model without some branches, and what ranks and costs their channels.

    Raises:
        InputError: The scores of heads do not differ and whole heads are removed, or a pattern matches no layer.
    """
    shallow = without_branches(unet, removed)
    groups = after_cuts(find_groups(shallow), earlier)
    _check_heads(groups, importance, params)
    widths = _patterns_of(unet, groups, params) if removed else params
    ranking = Ranking(groups, importance, find_gated(groups, widths, earlier), seed)
    dense, clock = (depth.dense, depth.clock) if depth else _dense_cost(unet, groups, params, earlier)
    costs = WidthCost(shallow, groups, heads=params.heads, latency_repeats=params.latency_repeats, clock=clock)
    return SearchSpace(groups, widths, ranking, costs, dense)


def _patterns_of(unet: Denoiser, groups: Sequence[Group], params: PruneParams) -> PruneParams:
    """Leave out the patterns of `include` and `exclude` that name only layers of branches that are gone.

    Raises:
        InputError: A pattern matches no layer of the whole model, or they leave nothing of it to cut.
    """
    try:
        choose_groups(find_groups(unet), params.include, params.exclude)
    except NoGroupError as error:  # whatever branches go
        raise InputError(error.message) from None
    layers = [layer for group in groups for layer in group.producers()]
    left = {
        key: [pattern for pattern in patterns if any(fnmatchcase(layer, pattern) for layer in layers)]
        for key, patterns in (("include", params.include), ("exclude", params.exclude))
    }
    return params.model_copy(update=left)


def _plan_groups(groups: Sequence[Group], cuts: Sequence[torch.Tensor]) -> list[PlannedGroup]:
    """Describe groups and the channels that each loses."""
    return [
        PlannedGroup(root=group.root, width=group.width, blocks=group.blocks, cut=cut.tolist())
        for group, cut in zip(groups, cuts, strict=True)
    ]


def _dense_cost(
    unet: Denoiser, groups: Sequence[Group], params: PruneParams, earlier: Plan | None
) -> tuple[float | None, SteadyClock | None]:
    """Compute the cost that the target is a share of, and the clock of a latency; None: of the model that is cut."""
    quantity = params.target.quantity
    if earlier is None:
        return None, None
    if quantity == "latency_ms":
        clock = SteadyClock(dense_model(unet, unet.device), params.latency_repeats)
        return clock.dense_ms, clock
    return dense_cost(unet, groups, quantity), None


def _solve(space: SearchSpace) -> tuple[Cuts, Budget]:
    """Decide how many channels each group loses, and warn if the target leaves most groups whole."""
    path = space.path()
    counts, budget = solve_budget(space.params, path, space.groups, space.costs, space.dense)
    if warning := whole_groups_warning(space.params, path, space.groups, counts):
        click.echo(f"Warning: {warning}", err=True)
    return counts, budget


def _base(unet: Denoiser, importance: Importance) -> Base:
    return Base(
        family=family_name(unet),
        architecture_sha256=architecture_sha256(unet),
        weights_sha256=importance.model_sha256,
    )


def _choose(
    unet: Denoiser, counts: Cuts, ranking: Ranking, params: PruneParams
) -> tuple[list[torch.Tensor], KeptIndices]:
    """Choose `counts` channels of every group, with scores on the dense widths or on the channels kept so far.

    Of a group whose values and gates are ranked apart, their scores decide how many.
    """
    kept: KeptIndices = {}
    cuts = []
    for index, (group, count) in enumerate(zip(ranking.groups, counts, strict=True)):
        widths = kept if params.order == "interleaved" else {}
        if index in ranking.gated:
            cuts.append(choose_pairs(ranking.halves(index, widths), group, params))
        else:
            cuts.append(choose_channels(ranking.channels(index, widths), group, count, params.heads))
        remove_channels(kept, group, cuts[-1], unet)
    return cuts, kept


def _check_heads(groups: Sequence[Group], importance: Importance, params: PruneParams) -> None:
    """Check that the scores of heads differ if whole heads are removed.

    Raises:
        InputError: The formula gives all heads of an attention the same scores.
    """
    if importance.formula == "ldm" and any(removes_heads(group, params.heads) for group in groups):
        raise InputError(
            "importance.formula ldm scores all heads alike; set prune.heads to width or use another formula"
        )
