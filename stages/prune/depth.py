"""prune.depth, a model, its importance and calibration batches -> the plan of the branches and channels that go."""

from collections.abc import Iterator, Sequence
from itertools import islice

import click

from stages.models.branches import check_removal, find_branches, most_removable
from stages.models.families import Denoiser
from stages.models.plan import Plan, show_cost
from stages.models.saliency import Importance
from stages.prune.branch_order import order_branches
from stages.prune.budget import TargetError, is_in_reach, out_of_reach
from stages.prune.calibration import CalibrationBatches
from stages.prune.compensate import difference
from stages.prune.depth_cost import DepthCost
from stages.prune.params import DepthParams, PruneParams
from stages.prune.path import NoGroupError
from stages.prune.selection import plan_pruning, smallest_cost
from stages.prune.surgery import cut
from stages.runtime.errors import InputError


class Prefixes:
    """The beginnings of an order that is found step by step."""

    def __init__(self, order: Iterator[str]) -> None:
        self.order, self.found = order, list[str]()

    def first(self, number: int) -> list[str]:
        """Return the first branches, fewer if the order ends before."""
        self.found += islice(self.order, max(number - len(self.found), 0))
        return self.found[:number]


def plan_depth(
    unet: Denoiser, importance: Importance, params: PruneParams, seed: int, batches: CalibrationBatches | None
) -> Plan:
    """Choose the residual branches that go, and the channels to cut from what stays.

    Args:
        unet: The dense model; it is not changed.
        importance: Its importance.
        params: The block prune, whose `depth` is set.
        seed: Seed of random scores.
        batches: The calibration images; None if `depth` needs none.

    Raises:
        InputError: The branches cannot go, or the target cannot be met.
    """
    depth = params.depth
    assert depth is not None
    branches = find_branches(unet)
    if not most_removable(branches):
        raise InputError("prune.depth: the model has no residual branch that can go; set it to null")
    if depth.names:
        return _plan(unet, importance, params, seed, depth.names)
    order = Prefixes(order_branches(depth.order, unet, importance, batches, seed))
    if depth.remove == "target":
        return _plan_to_target(unet, importance, params, seed, order)
    if depth.remove == "search":
        assert batches is not None
        return _search(unet, importance, params, seed, order, batches)
    return _plan(unet, importance, params, seed, order.first(count_removed(depth, most_removable(branches))))


def count_removed(depth: DepthParams, most: int) -> int:
    """Compute the number of branches that `remove` asks for, of `most` that can go.

    Raises:
        InputError: It is more than can go, or less than one.
    """
    if isinstance(depth.remove, float):
        number = int(depth.remove * most + 1e-9)
        if number == 0:
            found = f"prune.depth.remove {depth.remove:.4g} is less than one of the {most} branches that can go"
            raise InputError(f"{found}; give a number of branches, or a larger share")
        return number
    assert isinstance(depth.remove, int)
    if depth.remove > most:
        found = f"prune.depth.remove {depth.remove} is more than the {most} branches that can go"
        raise InputError(f"{found}; lower it in params.yaml")
    return depth.remove


def _plan(unet: Denoiser, importance: Importance, params: PruneParams, seed: int, names: Sequence[str]) -> Plan:
    """Plan the removal of certain branches, and the cut of the channels of what stays."""
    try:
        check_removal(unet, names)
    except InputError as error:
        raise InputError(f"prune.depth.remove: {error.message}") from None
    try:
        return plan_pruning(unet, importance, params, seed, removed=names)
    except NoGroupError:
        found = "prune.depth.remove takes every layer along that prune.include and prune.exclude leave to cut"
        raise NoGroupError(f"{found}; remove other branches, or widen the patterns") from None


def _plan_to_target(unet: Denoiser, importance: Importance, params: PruneParams, seed: int, order: Prefixes) -> Plan:
    """Remove branches one after the other until the cost is at most the target; no channel is cut.

    Raises:
        InputError: The target is out of reach.
    """
    cost = DepthCost(unet, params)
    smallest = cost.without(cost.dearest())
    _check_reach(cost, smallest, "by depth alone")
    number, found = 0, cost.dense
    while found > cost.highest:
        number += 1
        names = order.first(number)
        if len(names) < number:
            raise _out_of_reach(cost, found, "by depth alone in this prune.depth.order")
        found = cost.without(names)
    click.echo(f"prune.depth: {number} branches go: {', '.join(order.first(number)) or 'none'}", err=True)
    return plan_pruning(
        unet, importance, params, seed, removed=order.first(number), budget=cost.budget(found, smallest)
    )


def _check_reach(cost: DepthCost, smallest: float, how: str) -> None:
    """Check that the target lies between the smallest cost and that of the dense model.

    Raises:
        TargetError: It does not, as milliseconds were measured.
        InputError: It does not, whatever the scores are.
    """
    if is_in_reach(cost.quantity, cost.target, smallest, cost.dense):
        return
    error = _out_of_reach(cost, smallest, how)
    raise error if cost.quantity == "latency_ms" else InputError(error.message)


def _out_of_reach(cost: DepthCost, smallest: float, how: str) -> TargetError:
    return out_of_reach(cost.quantity, cost.target, smallest, cost.dense, f" {how}", "prune.target or prune.depth")


def _search(
    unet: Denoiser,
    importance: Importance,
    params: PruneParams,
    seed: int,
    order: Prefixes,
    batches: CalibrationBatches,
) -> Plan:
    """Plan for several numbers of branches, and return the plan whose model predicts most like the dense one.

    Raises:
        InputError: The target is out of reach.
    """
    plans = list[tuple[float, int, Plan]]()
    for number, plan in search_plans(unet, importance, params, seed, order):
        change = difference(unet, cut(unet, plan), batches)
        click.echo(
            f"prune.depth: {number} branches and {_cut_channels(plan)} channels change the prediction by {change:.4g}"
        )
        plans.append((change, number, plan))
    return min(plans, key=lambda found: found[:2])[2]


def search_plans(
    unet: Denoiser, importance: Importance, params: PruneParams, seed: int, order: Prefixes
) -> Iterator[tuple[int, Plan]]:
    """Yield the numbers of branches that a search compares, and the plan of each; there is at least one.

    Raises:
        InputError: The target is out of reach.
    """
    assert params.depth is not None
    cost, some = DepthCost(unet, params), False
    _check_reach(cost, smallest_cost(unet, importance, params, seed, cost), "by depth and width")
    for number in candidate_numbers(cost, order, params.depth.candidates):
        try:
            plan = plan_pruning(unet, importance, params, seed, removed=order.first(number), depth=cost)
        except InputError as error:
            click.echo(f"prune.depth: {number} branches do not do ({error.message})", err=True)
            continue
        some = True
        yield number, plan
    if not some:
        asked = f"prune.target {show_cost(cost.quantity, cost.target)}"
        found = f"prune.depth.remove search: no number of branches with a cut in width meets {asked}"
        raise TargetError(f"{found}; raise candidates, change prune.target, or set remove to target for depth alone")


def candidate_numbers(cost: DepthCost, order: Prefixes, candidates: int) -> list[int]:
    """Spread numbers of branches from 0 to the most that leave a cost of at least the target."""
    most = 0
    while len(names := order.first(most + 1)) > most and cost.without(names) >= cost.target:
        most += 1
    return sorted({round(most * index / (candidates - 1)) for index in range(candidates)})


def _cut_channels(plan: Plan) -> int:
    return sum(len(group.cut) for group in plan.groups)
