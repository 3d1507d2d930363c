"""A model -> the same model, which computes its deep blocks in every N-th sampling step and reuses them in between.

As DeepCache does for UNets (Ma, Fang and Wang, 2024, section 3.3) at the outermost level: between full passes, only the
blocks of the full resolution run, on the output of the last deep block from the last full pass. A family whose deep
blocks keep the shape of their input, such as DiT, reuses what they add to it.
"""

from collections.abc import Callable
from typing import Any

import torch

from stages.models.families import Denoiser, family_of
from stages.runtime.errors import InputError


class Passes:
    """Decides which passes are full.

    A pass is full if `interval` passes have gone by since the last full one, or if its timestep is not below that of
    the pass before or its batch is another one: then it begins another image, or repeats a step.

    Args:
        interval: Passes from one full one to the next.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.is_full = True
        self.since_full = 0
        self._last: tuple[float, int] = (float("-inf"), 0)

    def begin(self, timestep: float, batch_size: int) -> None:
        """Note that a pass begins."""
        last_timestep, last_size = self._last
        goes_on = timestep < last_timestep and batch_size == last_size
        self.since_full = (self.since_full + 1) % self.interval if goes_on else 0
        self.is_full, self._last = self.since_full == 0, (timestep, batch_size)


class CountedForward:
    """The forward of a model that counts its passes."""

    def __init__(self, model: Denoiser, passes: Passes) -> None:
        self.model, self.passes = model, passes

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor | float, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # as diffusers
        """Run the model; the timestep of the first image counts for the batch."""
        self.passes.begin(float(torch.as_tensor(timestep).reshape(-1)[0]), len(sample))
        return type(self.model).forward(self.model, sample, timestep, *args, **kwargs)


class DeepForward:
    """The forward of a deep block that computes nothing between full passes.

    It then returns tensors of the right shapes that hold nothing; those of the last block are the ones that are read.
    """

    def __init__(self, block: torch.nn.Module, passes: Passes) -> None:
        self.block, self.passes = block, passes
        self.kept: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # as diffusers
        """Run the block, or return what stands for its output."""
        if self.passes.is_full:
            output = type(self.block).forward(self.block, *args, **kwargs)
            self.kept = self.keep(output)
            return output
        return self.kept

    def keep(self, output: Any) -> Any:  # noqa: ANN401  # as diffusers
        """Return tensors of these shapes without memory."""
        if isinstance(output, tuple):
            return tuple(map(self.keep, output))
        return None if output is None else output.new_zeros(()).expand(output.shape)


class LastForward(DeepForward):
    """The forward of the last deep block, whose output is reused."""

    def keep(self, output: Any) -> Any:  # noqa: ANN401  # as diffusers
        """Keep the output."""
        return output


class PassedForward(DeepForward):
    """The forward of a deep block of constant shape; between full passes its input goes through."""

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # as diffusers
        """Run the block, or return its input."""
        if self.passes.is_full:
            return type(self.block).forward(self.block, hidden_states, *args, **kwargs)
        return hidden_states


class AddedForward(DeepForward):
    """The forward of the first deep block of constant shape; between full passes it adds what all of them added."""

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # as diffusers
        """Run the block on its input, which is kept; or add the change."""
        if self.passes.is_full:
            self.kept = hidden_states
            return type(self.block).forward(self.block, hidden_states, *args, **kwargs)
        return hidden_states + self.kept


class ChangeForward(PassedForward):
    """The forward of the last deep block of constant shape, which finds what all of them added."""

    def __init__(self, block: torch.nn.Module, passes: Passes, first: AddedForward) -> None:
        super().__init__(block, passes)
        self.first = first

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # as diffusers
        """Run the block and note the change since the first one's input, or return its own input."""
        output = super().__call__(hidden_states, *args, **kwargs)
        if self.passes.is_full:
            self.first.kept = output - self.first.kept
        return output


def check_cache(model: Denoiser) -> None:
    """Check that a model has blocks whose output can be reused.

    Raises:
        InputError: It has too few.
    """
    family = family_of(model)
    if not family.deep_blocks(model):
        raise InputError(f"cache-N reuses the blocks inside the outermost ones, and this {family.name} has none")


def cache(model: Denoiser, interval: int) -> Denoiser:
    """Let a model reuse its deep blocks, in place; it stays a model of its class, and its weights stay as they are.

    Args:
        model: A model of any widths.
        interval: Sampling steps from one full pass to the next; 1 makes every pass full.

    Raises:
        InputError: The model has too few blocks.
    """
    check_cache(model)
    family, passes = family_of(model), Passes(interval)
    names = family.deep_blocks(model)
    blocks = [model.get_submodule(name) for name in names]
    forwards = _adding(blocks, passes) if family.deep_blocks_add else _replacing(blocks, passes)
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    model.forward = CountedForward(model, passes)
    return model


def _replacing(blocks: list[torch.nn.Module], passes: Passes) -> list[Callable[..., Any]]:
    return [*(DeepForward(block, passes) for block in blocks[:-1]), LastForward(blocks[-1], passes)]


def _adding(blocks: list[torch.nn.Module], passes: Passes) -> list[Callable[..., Any]]:
    first = AddedForward(blocks[0], passes)
    middle = [PassedForward(block, passes) for block in blocks[1:-1]]
    return [first, *middle, ChangeForward(blocks[-1], passes, first)]


def interval_of(model: Denoiser) -> int:
    """Return the sampling steps from one full pass of a model to the next; 1 if it reuses nothing."""
    forward = model.__dict__.get("forward")
    return forward.passes.interval if isinstance(forward, CountedForward) else 1
