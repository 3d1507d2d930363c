"""A dense denoiser and a plan -> the pruned one, verified against the plan."""

import copy
from typing import cast

import torch

from stages.models.families import Denoiser, example_inputs, family_of, forward
from stages.models.groups import build_graph, cut_outputs
from stages.models.masking import TOLERANCE, relative_error, with_random_weights
from stages.models.plan import Plan
from stages.models.shortcuts import bypass
from stages.models.trust import WAY
from stages.runtime.errors import InputError


def cut(unet: Denoiser, plan: Plan) -> Denoiser:
    """Cut a copy of a denoiser as planned, with torch-pruning, and verify it.

    Raises:
        RuntimeError: The result differs from the plan, which is a bug of this program.
    """
    pruned = bypass(copy.deepcopy(unet), [branch.name for branch in plan.removed])
    graph = build_graph(pruned)
    for group in plan.groups:
        if group.cut:
            root = pruned.get_submodule(group.root)
            kept = set(plan.layers[group.root].outputs or ())
            removed = [channel for channel in range(len(cast("torch.Tensor", root.weight))) if channel not in kept]
            cut_outputs(pruned, graph, group.root, removed)
    family = family_of(pruned)
    family.set_heads(pruned, plan.heads)
    family.note_widths(pruned)
    verify(unet, pruned, plan)
    return pruned


@torch.no_grad()
def verify(dense: Denoiser, pruned: Denoiser, plan: Plan) -> None:
    """Check that every tensor equals the dense one sliced by the plan, and that the model runs.

    Raises:
        RuntimeError: A tensor differs, or the output is not finite or has another shape than the input.
    """
    expected = slice_tensors(dense, plan)
    for name, tensor in pruned.state_dict().items():
        if not torch.equal(tensor, expected[name]):
            raise RuntimeError(f"{name} {tuple(tensor.shape)} differs from the plan, {tuple(expected[name].shape)}")
    inputs = example_inputs(pruned)
    shape, output = inputs["sample"].shape, forward(pruned, inputs)
    if output.shape != shape or not output.isfinite().all():
        raise RuntimeError(f"the pruned model maps {tuple(shape)} to {tuple(output.shape)} or is not finite")
    if family_of(dense).proven:
        _check_masked(dense, pruned, plan)


def _check_masked(dense: Denoiser, pruned: Denoiser, plan: Plan) -> None:
    """Compare with the dense model whose cut channels are masked, also with random weights.

    The last layer of a model may be zero, and hide any difference.

    Raises:
        InputError: They differ.
    """
    sides = [(name, dim, (kept.outputs, kept.inputs)[dim]) for name, kept in plan.layers.items() for dim in (0, 1)]
    kept = {(name, dim): torch.tensor(channels) for name, dim, channels in sides if channels is not None}
    random, sliced = with_random_weights(dense), copy.deepcopy(pruned)
    sliced.load_state_dict(slice_tensors(random, plan))
    for one, other in ((dense, pruned), (random, sliced)):
        error = relative_error(one, other, kept)
        if not error <= TOLERANCE:
            found = f"the pruned model differs by {error:.2g} of the largest output from the dense one without"
            raise InputError(f"{found} these channels; describe or protect more layers ({WAY})")


def slice_tensors(dense: Denoiser, plan: Plan) -> dict[str, torch.Tensor]:
    """Index the dense tensors by the kept channels of the plan: the expected weights, without torch-pruning."""
    tensors, device = dict(dense.state_dict()), dense.device  # diffusers walks through all modules for it
    for layer, kept in plan.layers.items():
        for kind, sides in (("weight", (kept.outputs, kept.inputs)), ("bias", (kept.outputs,))):
            for dim, channels in enumerate(sides):
                name = f"{layer}.{kind}"
                if channels is not None and name in tensors:
                    tensors[name] = tensors[name].index_select(dim, torch.tensor(channels, device=device))
    return tensors
