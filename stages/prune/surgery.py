"""A dense UNet and a plan -> the pruned UNet, proved against the plan."""

import copy

import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from stages.diffusion.cost import example_inputs
from stages.diffusion.models import note_block_widths
from stages.prune.groups import build_graph
from stages.prune.plan import Plan


def cut(unet: UNet2DModel, plan: Plan) -> UNet2DModel:
    """Cut a copy of a UNet as planned, with torch-pruning, and prove it.

    Raises:
        RuntimeError: The result is not what the plan says; that is a defect of this program.
    """
    pruned = copy.deepcopy(unet)
    graph = build_graph(pruned)
    for group in plan.groups:
        if group.cut:
            root = pruned.get_submodule(group.root)
            graph.get_pruning_group(root, graph.get_pruner_of_module(root).prune_out_channels, group.cut).prune()
    note_block_widths(pruned)
    prove(unet, pruned, plan)
    return pruned


@torch.no_grad()
def prove(dense: UNet2DModel, pruned: UNet2DModel, plan: Plan) -> None:
    """Check every tensor against the dense one sliced by the plan, and that the model still draws.

    Raises:
        RuntimeError: A tensor differs, or the output is not finite or of another shape.
    """
    expected = slice_tensors(dense, plan)
    for name, tensor in pruned.state_dict().items():
        if not torch.equal(tensor, expected[name]):
            raise RuntimeError(f"{name} {tuple(tensor.shape)} is not what the plan says, {tuple(expected[name].shape)}")
    inputs = example_inputs(pruned)
    output = pruned(*inputs).sample
    if output.shape != inputs[0].shape or not output.isfinite().all():
        raise RuntimeError(f"the pruned model maps {tuple(inputs[0].shape)} to {tuple(output.shape)} or is not finite")


def slice_tensors(dense: UNet2DModel, plan: Plan) -> dict[str, torch.Tensor]:
    """Take from the dense tensors what the plan keeps, by indexing alone: the independent way to the same weights."""
    tensors = dict(dense.state_dict())
    for layer, kept in plan.layers.items():
        for kind, sides in (("weight", (kept.outputs, kept.inputs)), ("bias", (kept.outputs,))):
            for dim, channels in enumerate(sides):
                name = f"{layer}.{kind}"
                if channels is not None and name in tensors:
                    tensors[name] = tensors[name].index_select(dim, torch.tensor(channels, device=dense.device))
    return tensors
