"""A target and a path of cuts -> how many channels each group loses, so that the target is met."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import click

from stages.diffusion.groups import Group
from stages.errors import InputError
from stages.params import Frozen, PruneParams, Quantity
from stages.prune.costs import Costs
from stages.prune.path import Cuts, Step, follow

TOLERANCES: dict[Quantity, float] = {"channels": 0.01, "macs": 0.01, "params": 0.01, "latency_ms": 0.05}
UNITS: dict[Quantity, tuple[str, float]] = {
    "channels": ("channels", 1),
    "macs": ("M MACs", 1e6),
    "params": ("M parameters", 1e6),
    "latency_ms": ("ms", 1),
}


class Budget(Frozen):
    """What was asked for, what was possible, what was found."""

    quantity: Quantity
    asked: float
    found: float
    smallest: float
    """With every cut made that round_to, floor, include and exclude allow."""
    dense: float


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

    def solve(self, asked: float, smallest: float, dense: float) -> Cuts:
        """Find cuts whose cost is `asked` within the tolerance.

        Raises:
            InputError: No such cuts exist; the message says which costs do.
        """
        tolerance = TOLERANCES[self.quantity]
        if not smallest * (1 - tolerance) <= asked <= dense * (1 + tolerance):
            raise InputError(f"{self._impossible(asked)}; possible: {self.show(smallest)} to {self.show(dense)}")
        above = self._bisect(asked)
        nearest = [follow(self.path[:length], self.num_groups) for length in (above, above + 1)]
        costs = [self.cost(cuts) for cuts in nearest]
        for cuts, cost in sorted(zip(nearest, costs, strict=True), key=lambda pair: abs(pair[1] - asked)):
            if abs(cost - asked) <= tolerance * asked:
                return cuts
        refined = None if self.quantity == "latency_ms" else self._refine(above, asked)
        if refined is None:
            near = " and ".join(self.show(cost) for cost in sorted(costs))
            raise InputError(f"{self._impossible(asked)}; the nearest are {near}: lower round_to")
        return refined

    def _impossible(self, asked: float) -> str:
        return f"prune.target asks for {self.show(asked)}, which cannot be had"

    def show(self, cost: float) -> str:
        """Write a cost with its unit."""
        unit, scale = UNITS[self.quantity]
        return f"{cost / scale:.5g} {unit}"

    def _bisect(self, asked: float) -> int:
        """Find the longest prefix whose cost is not below `asked`."""
        low, high = 0, len(self.path)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.at(middle) >= asked else (low, middle - 1)
        return low

    def _refine(self, length: int, asked: float) -> Cuts | None:
        """Go on along the path past steps that fall too low, until the cost fits: a group passed over is finished."""
        cuts, finished = follow(self.path[:length], self.num_groups), set()
        for step in self.path[length:]:
            if step.group in finished or step.cut <= cuts[step.group]:
                continue
            tried = [step.cut if index == step.group else cut for index, cut in enumerate(cuts)]
            cost = self.cost(tried)
            if abs(cost - asked) <= TOLERANCES[self.quantity] * asked:
                return tried
            if cost > asked:
                cuts = tried
            else:
                finished.add(step.group)
        return None


def meet(params: PruneParams, path: Sequence[Step], groups: Sequence[Group], costs: Costs) -> tuple[Cuts, Budget]:
    """Decide how many channels every group loses.

    Raises:
        InputError: The target cannot be met.
    """
    quantity, none = params.target.quantity, [0] * len(groups)
    cost: Callable[[Cuts], float] = getattr(costs, quantity)
    dense, smallest = cost(none), cost(follow(path, len(groups)))
    asked = params.target.asked(dense)
    show = Solver(path, len(groups), quantity, cost).show
    click.echo(f"smallest {show(smallest)}, asked {show(asked)}, dense {show(dense)}")
    if params.target.ratio is not None and params.ranking == "uniform":
        cuts = cut_ratio(params.target.ratio, path, groups)
    else:
        cuts = Solver(path, len(groups), quantity, cost).solve(asked, smallest, dense)
    return cuts, Budget(quantity=quantity, asked=asked, found=cost(cuts), smallest=smallest, dense=dense)


def cut_ratio(ratio: float, path: Sequence[Step], groups: Sequence[Group]) -> Cuts:
    """Cut n − int(n·(1 − ratio)) of every group's n channels, rounded down to what the group allows, as the paper does.

    Raises:
        InputError: A group that may be cut could go no further than its floor.
    """
    allowed = [group.width - int(group.width * (1 - ratio)) for group in groups]
    last = follow(path, len(groups))
    for index in sorted({step.group for step in path}):
        group, step = groups[index], min(step.cut for step in path if step.group == index)
        if allowed[index] - last[index] >= step:
            left = f"prune.target.ratio {ratio} leaves {group.width - allowed[index]} of {group.width} channels"
            raise InputError(f"{left} in {group.root}, at least {group.width - last[index]} must stay; lower the ratio")
    return follow([step for step in path if step.cut <= allowed[step.group]], len(groups))
