"""A model -> its residual branches, which of them can go, and what their removal saves."""

from collections.abc import Collection, Sequence
from difflib import get_close_matches

from stages.models.complexity import count_module_macs, count_params
from stages.models.families import Denoiser, family_of, skeleton
from stages.models.families.family import Branch
from stages.models.plan import RemovedBranch
from stages.models.shortcuts import bypass
from stages.runtime.errors import InputError


def find_branches(unet: Denoiser) -> list[Branch]:
    """List the residual branches that a model has left, in the order in which they run."""
    return family_of(unet).residual_branches(unet)


def removable(branches: Sequence[Branch], removed: Collection[str] = ()) -> list[Branch]:
    """List the branches that can go next: one of those that read each input of the model stays."""
    left = [branch for branch in branches if branch.name not in removed]
    readers = [name for branch in left for name in branch.reads]
    return [branch for branch in left if all(readers.count(name) > 1 for name in branch.reads)]


def most_removable(branches: Sequence[Branch]) -> int:
    """Count how many branches can go, one after the other."""
    removed: list[str] = []
    while found := removable(branches, removed):
        removed.append(found[0].name)
    return len(removed)


def check_removal(unet: Denoiser, names: Sequence[str]) -> None:
    """Check that a model has these residual branches and can lose all of them.

    Raises:
        InputError: A name is unknown, repeated, or not that of a branch that can be bypassed, or too many would go.
    """
    branches = {branch.name: branch for branch in find_branches(unet)}
    modules = {name for name, _ in unet.named_modules()}
    for name in names:
        if name not in branches:
            reason = "is no residual branch whose shortcut can stay alone" if name in modules else "is not in the model"
            near = get_close_matches(name, branches, 1, 0)
            hint = f"; a branch that can go is {near[0]}" if near else ""
            raise InputError(f"the module {name} {reason}{hint}")
        if names.count(name) > 1:
            raise InputError(f"the branch {name} is removed twice; name it once")
    for index, name in enumerate(names):
        if branches[name] not in removable(list(branches.values()), names[:index]):
            reads = " or ".join(branches[name].reads)
            left = f"without {name} after {index} other residual branches, no branch of its kind would read the {reads}"
            raise InputError(f"{left}; at most {most_removable(list(branches.values()))} of {len(branches)} can go")


def record_removal(unet: Denoiser, names: Sequence[str]) -> list[RemovedBranch]:
    """Describe branches for the plan: kind, and the MACs and parameters that the removal of each saves."""
    if not names:
        return []
    bare, macs = skeleton(unet), count_module_macs(unet)
    kinds = {branch.name: branch.kind for branch in find_branches(unet)}
    shallow = dict(bypass(skeleton(unet), names).named_modules())
    return [
        RemovedBranch(
            name=name,
            kind=kinds[name],
            macs=sum(number for layer, number in macs.items() if layer.startswith(f"{name}.") and layer not in shallow),
            params=count_params(bare.get_submodule(name)) - count_params(shallow[name]),
        )
        for name in names
    ]
