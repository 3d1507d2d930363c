"""A dense model and its target -> the costs of the model without some of its residual branches."""

from collections.abc import Sequence

from stages.models.branches import find_branches, record_removal, removable
from stages.models.families import Denoiser, skeleton
from stages.models.latency import SETTING, SteadyClock
from stages.models.plan import Budget
from stages.models.shortcuts import without_branches
from stages.prune.budget import TOLERANCES
from stages.prune.earlier import count_cost
from stages.prune.params import PruneParams


class DepthCost:
    """MACs, parameters or milliseconds of a model without some branches, whichever prune.target limits.

    Args:
        unet: The dense model.
        params: The block prune; its target is no ratio.
    """

    def __init__(self, unet: Denoiser, params: PruneParams) -> None:
        self.unet, self.quantity = unet, params.target.quantity
        self.bare = skeleton(unet)
        self.clock = SteadyClock(unet, params.latency_repeats)
        self.dense = self.clock.dense_ms if self.quantity == "latency_ms" else count_cost(unet, self.quantity)
        self.target = params.target.resolve(self.dense)
        self.highest = self.target * (1 + TOLERANCES[self.quantity])

    def without(self, names: Sequence[str]) -> float:
        """Count, or measure in turns with the dense model, the cost without branches."""
        if self.quantity != "latency_ms":
            return count_cost(without_branches(self.bare, names), self.quantity)
        return self.clock.measure_ms(without_branches(self.unet, names))

    def dearest(self) -> list[str]:
        """List as many branches as can go, those that save most first; without them the model is at its smallest."""
        branches = find_branches(self.unet)
        saved = {
            branch.name: branch.params if self.quantity == "params" else branch.macs
            for branch in record_removal(self.bare, [branch.name for branch in branches])
        }
        names: list[str] = []
        while found := removable(branches, names):
            names.append(max(found, key=lambda branch: saved[branch.name]).name)
        return names

    def budget(self, found: float, smallest: float) -> Budget:
        """Describe the cost that was reached."""
        setting = SETTING if self.quantity == "latency_ms" else None
        return Budget(
            quantity=self.quantity, asked=self.target, found=found, smallest=smallest, dense=self.dense, setting=setting
        )
