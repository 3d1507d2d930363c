"""A denoiser -> proof, before any stage runs, that it can be sampled from, scored and cut."""

from math import gcd

import torch

from stages.models.families import Denoiser, example_inputs, family_of, forward, skeleton
from stages.models.groups import Group, build_graph, cut_outputs, find_groups
from stages.models.masking import check_masked
from stages.models.structure import once_per_structure
from stages.runtime.errors import CODE_ERRORS, InputError, SignalExit, first_line

SMALL_SIZE = 32
"""Height and width, in pixels or latents, that are enough to try the weights of a denoiser."""


@torch.no_grad()
def check_runs(unet: Denoiser, num_timesteps: int, origin: str) -> None:
    """Run a denoiser at its first, middle and last timestep, on small images where its own are large.

    Raises:
        InputError: The denoiser knows fewer timesteps or raises an exception, or an output is not finite or has another
            shape than its input.
    """
    family = family_of(unet)
    known = family.known_timesteps(unet)
    if known is not None and known < num_timesteps:
        found = f"num_train_timesteps of the UNet is {known}, of its scheduler {num_timesteps}"
        raise InputError(f"{origin}: {found}, and the UNet has learned its timesteps; correct the scheduler's config")
    timesteps = torch.tensor([0, num_timesteps // 2, num_timesteps - 1], device=unet.device)
    where = f"at the timesteps {', '.join(str(step) for step in timesteps.tolist())}"
    inputs = {**example_inputs(unet, len(timesteps)), "timestep": timesteps}
    multiple = family.side_multiple(unet)
    inputs["sample"] = _shrink(inputs["sample"], multiple) if multiple else inputs["sample"]
    try:
        output = forward(unet, inputs)
    except SignalExit:
        raise
    except CODE_ERRORS as error:  # an arbitrary config can make diffusers raise any exception
        raise InputError(f"{origin}: the model does not run {where} ({first_line(error)})") from None
    if output.shape != inputs["sample"].shape:
        raise InputError(f"{origin}: the model's output does not have the shape of its input")
    broken = [step for step, image in zip(timesteps.tolist(), output, strict=True) if not image.isfinite().all()]
    if broken:
        raise InputError(f"{origin}: the model's output is not finite at timestep {broken[0]}; use another checkpoint")


def _shrink(images: torch.Tensor, multiple: int) -> torch.Tensor:
    """Crop images by a power of two to some 32 pixels, with sides that stay multiples of `multiple` where they are."""
    factor, sides = 1, images.shape[2:]
    while min(sides) // factor >= 2 * SMALL_SIZE and all(
        side % (2 * factor) == 0 and gcd(side // (2 * factor), multiple) == gcd(side, multiple) for side in sides
    ):
        factor *= 2
    return images[..., : sides[0] // factor, : sides[1] // factor]


def check_prunable(unet: Denoiser, origin: str) -> None:
    """Score, trace and cut a copy without weights: the fewest channels of every group, then a forward pass.

    Raises:
        InputError: The denoiser does not run at its own size, or its channels cannot be cut.
    """
    try:
        _score_and_cut(unet)
    except InputError as error:
        raise InputError(f"{origin}: {error.message}") from None


@once_per_structure
def _score_and_cut(unet: Denoiser) -> None:
    """Do what `check_prunable` says, once for all models of one structure.

    Raises:
        InputError: As there, without saying which model it is.
    """
    bare = skeleton(unet)
    inputs = example_inputs(bare)
    try:
        output = forward(bare, inputs)
        output.sum().backward()
    except SignalExit:
        raise
    except CODE_ERRORS as error:
        hint = "; forward must make tensors on the device of its inputs, and read no values" * family_of(unet).proven
        raise InputError(f"the model does not run ({first_line(error)}){hint}") from None
    if output.shape != inputs["sample"].shape:
        raise InputError("the model's output does not have the shape of its input")
    try:
        groups = find_groups(unet)
        if family_of(unet).proven:
            check_masked(unet, groups)
        _cut_all(bare, groups)
        output = forward(bare, inputs)
    except (InputError, SignalExit):
        raise
    except CODE_ERRORS as error:  # torch-pruning raises any exception, too
        raise InputError(f"the model cannot be pruned ({first_line(error)}); use another one") from None
    if output.shape != inputs["sample"].shape:
        raise InputError("the model cannot be pruned (a cut changes the shape of its output)")


def _cut_all(bare: Denoiser, groups: list[Group]) -> None:
    """Remove one channel of each block of each group, as the prune stage does, and compare with the groups.

    Raises:
        ValueError: A layer loses another number of channels than its groups say.
    """
    graph, family = build_graph(bare), family_of(bare)
    expected = {(name, dim): size for name, layer in bare.named_modules() for dim, size in _sizes(layer)}
    for group in groups:
        block_width = group.width // group.blocks
        if block_width == 1 or (group.whole and group.blocks == 1):
            continue
        removed = torch.arange(block_width) if group.whole else torch.arange(0, group.width, block_width)
        for member in group.members:
            lost = int(torch.isin(member.roots, removed).sum())
            expected[member.layer, member.dim] -= lost
        root = next(member for member in group.members if (member.layer, member.dim) == (group.root, 0))
        channels = root.channels[torch.isin(root.roots, removed)].tolist()
        cut_outputs(bare, graph, group.root, channels)
        if group.whole:
            family.set_heads(bare, dict.fromkeys(group.attentions, group.blocks - 1))
    family.note_widths(bare)
    for name, layer in bare.named_modules():
        for dim, size in _sizes(layer):
            if size != expected[name, dim]:
                raise ValueError(f"{name} keeps {size} channels of {expected[name, dim]} that its groups leave")


def _sizes(layer: torch.nn.Module) -> list[tuple[int, int]]:
    """List the dimensions of a layer's weight that a cut can change, with their sizes."""
    weight = getattr(layer, "weight", None)
    return list(enumerate(weight.shape[:2])) if isinstance(weight, torch.Tensor) else []
