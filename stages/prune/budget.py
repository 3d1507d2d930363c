"""A target and a path of cuts -> how many channels each group loses, so that the target is met."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stages.models.groups import Group
from stages.models.params import Quantity
from stages.models.plan import Budget, show_cost
from stages.prune.params import PruneParams
from stages.prune.path import Cuts, Step, follow, quantum
from stages.prune.width_cost import Costs
from stages.runtime.errors import InputError

TOLERANCES: dict[Quantity, float] = {"channels": 0.01, "macs": 0.01, "params": 0.01, "latency_ms": 0.05}


@dataclass(frozen=True)
class Solver:
    """Finds the place on a path where a cost meets its target."""

    path: Sequence[Step]
    num_groups: int
    quantity: Quantity
    cost: Callable[[Cuts], float]
    """Falls along the path."""

    def at(self, length: int) -> float:
        """Measure the cost after that many steps."""
        return self.cost(follow(self.path[:length], self.num_groups))

    def solve(self, asked: float, smallest: float, dense: float) -> tuple[float, Cuts]:
        """Find cuts whose cost is `asked` within the tolerance, and that cost.

        Raises:
            InputError: No such cuts exist; the message says which costs do.
        """
        tolerance = TOLERANCES[self.quantity]
        if not smallest * (1 - tolerance) <= asked <= dense * (1 + tolerance):
            limits = " to ".join(show_cost(self.quantity, cost) for cost in (smallest, dense))
            raise InputError(f"{self._impossible(asked)}; possible: {limits}")
        above = self._bisect(asked)
        nearest = [follow(self.path[:length], self.num_groups) for length in (above, above + 1)]
        measured = sorted(((self.cost(cuts), cuts) for cuts in nearest), key=lambda pair: abs(pair[0] - asked))
        if self.fits(measured[0][0], asked):
            return measured[0]
        refined = None if self.quantity == "latency_ms" else self._refine(above, asked)
        if refined is None:
            near = " and ".join(show_cost(self.quantity, cost) for cost, _ in sorted(measured))
            key = "raise latency_repeats" if self.quantity == "latency_ms" else "lower round_to"
            raise InputError(f"{self._impossible(asked)}; the nearest are {near}: {key}")
        return refined

    def fits(self, cost: float, asked: float) -> bool:
        """Tell whether a cost is what was asked, within the tolerance."""
        return abs(cost - asked) <= TOLERANCES[self.quantity] * asked

    def _impossible(self, asked: float) -> str:
        return f"prune.target asks for {show_cost(self.quantity, asked)}, which cannot be had"

    def _bisect(self, asked: float) -> int:
        """Find the longest prefix whose cost is not below `asked`."""
        low, high = 0, len(self.path)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.at(middle) >= asked else (low, middle - 1)
        return low

    def _refine(self, length: int, asked: float) -> tuple[float, Cuts] | None:
        """Go on along the path past steps that fall too low, until the cost fits: a group passed over is finished."""
        cuts, finished = follow(self.path[:length], self.num_groups), set()
        for step in self.path[length:]:
            if step.group in finished or step.cut <= cuts[step.group]:
                continue
            tried = [step.cut if index == step.group else cut for index, cut in enumerate(cuts)]
            cost = self.cost(tried)
            if self.fits(cost, asked):
                return cost, tried
            if cost > asked:
                cuts = tried
            else:
                finished.add(step.group)
        return None


def solve_budget(
    params: PruneParams, path: Sequence[Step], groups: Sequence[Group], costs: Costs
) -> tuple[Cuts, Budget]:
    """Decide how many channels every group loses.

    Raises:
        InputError: The target cannot be met.
    """
    quantity, none = params.target.quantity, [0] * len(groups)
    cost: Callable[[Cuts], float] = getattr(costs, quantity)
    dense, smallest = cost(none), cost(follow(path, len(groups)))
    asked = params.target.asked(dense)
    if params.target.ratio is not None and params.ranking == "uniform":
        cuts = cut_ratio(params.target.ratio, path, groups, params)
        found = cost(cuts)
    else:
        found, cuts = Solver(path, len(groups), quantity, cost).solve(asked, smallest, dense)
    return cuts, Budget(quantity=quantity, asked=asked, found=found, smallest=smallest, dense=dense)


def cut_ratio(ratio: float, path: Sequence[Step], groups: Sequence[Group], params: PruneParams) -> Cuts:
    """Cut n − int(n·(1 − ratio)) of every group's n channels, rounded down to what the group allows, as the paper does.

    Raises:
        InputError: A group that may be cut would go below its floor, or none can be cut.
    """
    if ratio and not path:
        raise InputError("no group can be cut at all with this prune.round_to and prune.floor; lower one of them")
    allowed = [group.width - int(group.width * (1 - ratio)) for group in groups]
    last = follow(path, len(groups))
    for index in sorted({step.group for step in path}):
        group = groups[index]
        if allowed[index] - last[index] >= quantum(group, params):
            left = f"prune.target.ratio {ratio} leaves {group.width - allowed[index]} of {group.width} channels"
            raise InputError(f"{left} in {group.root}, at least {group.width - last[index]} must stay; lower the ratio")
    cuts = follow([step for step in path if step.cut <= allowed[step.group]], len(groups))
    if ratio and not any(cuts):
        raise InputError(f"prune.target.ratio {ratio} cuts nothing at prune.round_to {params.round_to}; lower round_to")
    return cuts
