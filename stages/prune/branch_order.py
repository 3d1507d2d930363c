"""A model, its importance and calibration batches -> the order in which its residual branches are removed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from stages.models.branches import find_branches, removable
from stages.models.families import Denoiser, family_of, prediction
from stages.models.families.family import Branch
from stages.models.pruned_unet import replace_module
from stages.models.saliency import Importance
from stages.prune.calibration import CalibrationBatches, NoisyBatch
from stages.runtime.progress import track
from stages.runtime.seeds import generator

Order = Iterator[str]
"""Names of branches, found one by one, until no further one can go."""


def order_branches(
    order: str, unet: Denoiser, importance: Importance, batches: CalibrationBatches | None, seed: int
) -> Order:
    """Yield the branches in one of the orders of prune.depth; greedy and similarity need batches.

    A branch whose removal would leave an input of the model unread is passed over.
    """
    if order == "score":
        return _ascending(find_branches(unet), score_branches(unet, importance, seed))
    assert batches is not None
    if order == "similarity":
        similarity = measure_similarity(unet, batches)
        return _ascending(find_branches(unet), {name: -value for name, value in similarity.items()})
    return order_greedily(unet, batches)


def _ascending(branches: Sequence[Branch], keys: Mapping[str, float]) -> Order:
    """Yield the branch with the lowest key among those that can go, until none can."""
    removed: list[str] = []
    while found := removable(branches, removed):
        removed.append(min(found, key=lambda branch: keys[branch.name]).name)
        yield removed[-1]


def score_branches(unet: Denoiser, importance: Importance, seed: int) -> dict[str, float]:
    """Sum the scores of each branch's weights: Σ over layers and their outputs of |Σ saliency|; the shortcut stays out.

    For the criterion random, whose importance has no saliencies, the scores are drawn.
    """
    names = [branch.name for branch in find_branches(unet)]
    if not importance.saliency:
        draws = torch.rand(len(names), generator=generator(seed, "random depth"))
        return dict(zip(names, draws.tolist(), strict=True))
    return {name: _score(name, importance) for name in names}


def _score(name: str, importance: Importance) -> float:
    """Score the layers of a branch."""
    layers = [
        saliency
        for layer, saliency in importance.saliency.items()
        if layer.startswith(f"{name}.") and layer != f"{name}.conv_shortcut"
    ]
    outputs = [saliency.double().reshape(len(saliency), -1).sum(1).abs().sum() for saliency in layers]
    return sum(map(float, outputs))


@torch.no_grad()
def order_greedily(unet: Denoiser, batches: CalibrationBatches) -> Order:
    """Yield, one after the other, the branch whose removal changes the dense model's prediction least.

    The change is the mean of ‖y − y'‖² over images and timesteps, where y' is without this branch and those before it.
    """
    branches, removed = find_branches(unet), list[str]()
    while found := removable(branches, removed):
        names = [branch.name for branch in found]
        total = dict.fromkeys(names, 0.0)
        for batch in track(batches, f"prune.depth, branch {len(removed) + 1}", len(batches)):
            dense = _predict(unet, (), batch)
            for name in names:
                total[name] += float((_predict(unet, (*removed, name), batch) - dense).square().sum())
        removed.append(min(names, key=lambda name: total[name]))
        yield removed[-1]


def _predict(unet: Denoiser, without: Sequence[str], batch: NoisyBatch) -> torch.Tensor:
    """Predict with some branches bypassed for the while of this pass: [B, C, H, W]."""
    shortcut = family_of(unet).shortcut
    modules = {name: unet.get_submodule(name) for name in without}
    try:
        for name, module in modules.items():
            replace_module(unet, name, shortcut(module))
        return prediction(unet(*batch).sample, unet)
    finally:
        for name, module in modules.items():
            replace_module(unet, name, module)


@torch.no_grad()
def measure_similarity(unet: Denoiser, batches: CalibrationBatches) -> dict[str, float]:
    """Average, over images and timesteps, the cosine of each branch's shortcut and its module's output.

    cos(s, y) = ⟨s, y⟩ / (‖s‖·‖y‖) over the numbers of one image, where s is what would stay without the branch: the
    input, or its convolution by the shortcut.
    """
    total = dict.fromkeys((branch.name for branch in find_branches(unet)), 0.0)

    def add(name: str, shortcut: Callable[..., object], inputs: tuple[torch.Tensor, ...], output: object) -> None:
        """Add the cosines of a batch."""
        stays, whole = (_tensor(value).double().flatten(1) for value in (shortcut(inputs[0]), output))
        total[name] += float(torch.cosine_similarity(stays, whole).sum())

    hooks = [
        module.register_forward_hook(partial(_call, partial(add, name, family_of(unet).shortcut(module))))
        for name, module in ((name, unet.get_submodule(name)) for name in total)
    ]
    count = 0
    try:
        for batch in track(batches, "prune.depth, similarity", len(batches)):
            unet(*batch)
            count += len(batch[0])
    finally:
        for hook in hooks:
            hook.remove()
    return {name: value / count for name, value in total.items()}


def _call(add: Callable[..., None], _module: nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
    """Pass what a forward hook gets to `add`; it must return nothing, since that would replace the output."""
    add(inputs, output)


def _tensor(output: object) -> torch.Tensor:
    """Return the tensor of a module's output, which may be in a tuple."""
    first = output[0] if isinstance(output, tuple) else output
    assert isinstance(first, torch.Tensor)
    return first
