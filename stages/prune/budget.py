"""A target and a path of cuts -> how many channels each group loses, so that the target is met."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stages.models.groups import Group
from stages.models.latency import SETTING
from stages.models.params import Quantity
from stages.models.plan import Budget, show_cost
from stages.prune.params import Heads, PruneParams
from stages.prune.path import Cuts, Step, cuts_after, width_removed, width_step
from stages.prune.whole_groups import smallest_ratio
from stages.prune.width_cost import WidthCost
from stages.runtime.errors import InputError

TOLERANCES: dict[Quantity, float] = {"channels": 0.01, "macs": 0.01, "params": 0.01, "latency_ms": 0.05}
"""Allowed relative difference between target and result."""


class TargetError(InputError):
    """The target cannot be met with these scores, branches or measured times; with others it may be."""


def is_in_reach(quantity: Quantity, target_cost: float, smallest: float, whole: float) -> bool:
    """Whether a target lies, within its tolerance, between the smallest cost and that of the whole model."""
    tolerance = TOLERANCES[quantity]
    return smallest * (1 - tolerance) <= target_cost <= whole * (1 + tolerance)


def out_of_reach(
    quantity: Quantity, target_cost: float, smallest: float, whole: float, how: str = "", change: str = "prune.target"
) -> TargetError:
    """Describe a target that cannot be met, with the range of those that can.

    Args:
        quantity: What the costs count.
        target_cost: The absolute target.
        smallest: The smallest possible cost.
        whole: The cost of the model as it is.
        how: By what the cost would fall.
        change: The keys that a user can change.
    """
    limits = " to ".join(show_cost(quantity, cost) for cost in (smallest, whole))
    found = f"prune.target {show_cost(quantity, target_cost)} is out of reach{how}"
    return TargetError(f"{found}: possible from {limits}; change {change}")


@dataclass(frozen=True)
class Solver:
    """Finds the point on a path where the cost meets the target."""

    path: Sequence[Step]
    num_groups: int
    quantity: Quantity
    cost: Callable[[Cuts], float]
    """Cuts -> cost; it decreases along the path."""

    def solve(self, target_cost: float, smallest: float, whole: float) -> tuple[float, Cuts]:
        """Find cuts whose cost is `target_cost` within the tolerance, and return their cost and them.

        Args:
            target_cost: The absolute target.
            smallest: The cost at the end of the path.
            whole: The cost without a cut.

        Raises:
            TargetError: No such cuts exist; the message has the costs that are possible.
        """
        if not is_in_reach(self.quantity, target_cost, smallest, whole):
            raise out_of_reach(self.quantity, target_cost, smallest, whole)
        above = self._bisect(target_cost)
        nearest = [self._cuts(length) for length in (above, above + 1)]
        measured = sorted(((self.cost(cuts), cuts) for cuts in nearest), key=lambda pair: abs(pair[0] - target_cost))
        if self._fits(measured[0][0], target_cost):
            return measured[0]
        refined = None if self.quantity == "latency_ms" else self._refine(above, target_cost)
        if refined is None:
            near = " and ".join(show_cost(self.quantity, cost) for cost, _ in sorted(measured))
            advice = "raise prune.latency_repeats" if self.quantity == "latency_ms" else "lower prune.round_to"
            found = f"prune.target {show_cost(self.quantity, target_cost)} is out of reach"
            raise TargetError(f"{found}: the nearest possible are {near}; {advice}")
        return refined

    def _cuts(self, length: int) -> Cuts:
        return cuts_after(self.path[:length], self.num_groups)

    def _fits(self, cost: float, target_cost: float) -> bool:
        return abs(cost - target_cost) <= TOLERANCES[self.quantity] * target_cost

    def _bisect(self, target_cost: float) -> int:
        """Find the longest prefix of the path whose cost is not below `target_cost`."""
        low, high = 0, len(self.path)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.cost(self._cuts(middle)) >= target_cost else (low, middle - 1)
        return low

    def _refine(self, length: int, target_cost: float) -> tuple[float, Cuts] | None:
        """Continue after the first `length` steps and skip steps whose cost is too low, until the cost fits.

        A group with a skipped step is not cut further.
        """
        cuts, finished = self._cuts(length), set()
        for step in self.path[length:]:
            if step.group in finished or step.cut <= cuts[step.group]:
                continue
            tried = [step.cut if index == step.group else cut for index, cut in enumerate(cuts)]
            cost = self.cost(tried)
            if self._fits(cost, target_cost):
                return cost, tried
            if cost > target_cost:
                cuts = tried
            else:
                finished.add(step.group)
        return None


def solve_budget(
    params: PruneParams, path: Sequence[Step], groups: Sequence[Group], costs: WidthCost, dense: float | None = None
) -> tuple[Cuts, Budget]:
    """Decide how many channels every group loses.

    Args:
        params: The block prune.
        path: The path of cuts.
        groups: The groups of the model.
        costs: The costs of its widths.
        dense: The cost of the dense model, of which a target is a share; None if the model itself is dense.

    Raises:
        InputError: The target cannot be met.
    """
    target, uncut = params.target, [0] * len(groups)
    cost: Callable[[Cuts], float] = getattr(costs, target.quantity)
    whole, smallest = cost(uncut), cost(cuts_after(path, len(groups)))
    dense = whole if dense is None else dense
    target_cost = target.resolve(dense)
    if target.ratio is not None and params.ranking == "uniform":
        cuts = cut_ratio(target.ratio, path, groups, params.round_to, params.heads)
        found = cost(cuts)
    else:
        found, cuts = Solver(path, len(groups), target.quantity, cost).solve(target_cost, smallest, whole)
    return cuts, Budget(
        quantity=target.quantity,
        asked=target_cost,
        found=found,
        smallest=smallest,
        dense=dense,
        setting=SETTING if target.quantity == "latency_ms" else None,
    )


def cut_ratio(ratio: float, path: Sequence[Step], groups: Sequence[Group], round_to: int, heads: Heads) -> Cuts:
    """Remove n − int(n·(1 − ratio)) of every group's n channels, as in the paper, rounded down to its width step.

    Channels that earlier cuts removed count among them.

    Raises:
        InputError: A group that may be cut would have fewer channels than its floor, or no group can be cut.
    """
    if ratio and not path:
        found = f"no group can be cut with prune.round_to {round_to}, this prune.floor"
        raise InputError(f"{found} and the model's norm groups and heads; lower round_to or floor, or cut other layers")
    allowed = [max(width_removed(group.original_width, ratio) - group.lost, 0) for group in groups]
    last = cuts_after(path, len(groups))
    for index in sorted({step.group for step in path}):
        group = groups[index]
        if allowed[index] - last[index] >= width_step(group, round_to, heads):
            left = (
                f"prune.target.ratio {ratio} leaves {group.width - allowed[index]} of {group.original_width} channels"
            )
            advice = "lower the ratio or prune.floor"
            raise TargetError(f"{left} in {group.root}, at least {group.width - last[index]} must stay; {advice}")
    cuts = cuts_after([step for step in path if step.cut <= allowed[step.group]], len(groups))
    if ratio and not any(cuts):
        smallest = smallest_ratio(path, groups, range(len(groups)))
        advice = "lower round_to or use" if round_to > 1 else "norm groups and heads stay of equal size; use"
        found = f"prune.target.ratio {ratio} cuts nothing at prune.round_to {round_to}"
        raise TargetError(f"{found}; {advice} a ratio of at least {smallest:.3g}")
    return cuts
