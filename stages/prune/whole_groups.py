"""A path and the cuts of a target -> the groups that lose nothing, and from which ratio on they would."""

import math
from collections.abc import Sequence

from stages.models.groups import Group
from stages.prune.params import PruneParams
from stages.prune.path import Cuts, Step, choose_groups, width_removed

REASON = "their norm groups, heads, prune.round_to or prune.floor"


def first_cuts(path: Sequence[Step]) -> dict[int, int]:
    """Find the fewest channels that each group on the path can lose: index of the group -> number of channels."""
    return {step.group: step.cut for step in sorted(path, key=lambda step: step.cut, reverse=True)}


def smallest_ratio(path: Sequence[Step], groups: Sequence[Group], indices: Sequence[int]) -> float | None:
    """Find the smallest ratio, in thousandths, at which one of these groups loses channels; None if none ever does."""
    first = first_cuts(path)
    ratios = [_ratio_of_cut(groups[index], first[index]) for index in indices if index in first]
    return min(ratios, default=None)


def _ratio_of_cut(group: Group, cut: int) -> float:
    removed = group.lost + cut
    thousandths = math.floor(1000 * (removed - 1) / group.original_width)
    while width_removed(group.original_width, thousandths / 1000) < removed:
        thousandths += 1
    return thousandths / 1000


def whole_groups_warning(params: PruneParams, path: Sequence[Step], groups: Sequence[Group], cuts: Cuts) -> str | None:
    """Return a warning if more than half of the groups that may be cut stay whole, though the target cuts others.

    Under global ranking the scores decide which groups stay whole, so there only those count that cannot be cut at all.
    """
    chosen, on_path = choose_groups(groups, params.include, params.exclude), first_cuts(path)
    whole = sorted(index for index in chosen if not cuts[index])
    fixed = [index for index in whole if index not in on_path]
    found = fixed if params.ranking == "global" else whole
    if not any(cuts) or 2 * len(found) <= len(chosen):
        return None
    ((name, amount),) = params.target.given().items()
    text = f"prune.target.{name} {amount} cuts nothing from {len(found)} of {len(chosen)} groups ({REASON})"
    ratio = smallest_ratio(path, groups, whole)
    if name == "ratio" and params.ranking == "uniform" and ratio is not None:
        text += f"; the smallest ratio that would is {ratio:.3g}"
    return text + (f"; no target cuts {len(fixed)} of them" if fixed else "")
