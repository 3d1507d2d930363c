"""A dense denoiser and the number of channels that each group loses -> the cost of the pruned one."""

import copy
import functools
import math
from collections.abc import Sequence

import torch
from torch import nn

from stages.models.complexity import count_macs, count_params
from stages.models.families import Denoiser, example_inputs, family_of, forward, skeleton
from stages.models.groups import Group, weighted_layers
from stages.models.latency import SteadyClock
from stages.models.structure import once_per_structure
from stages.prune.params import Heads
from stages.prune.path import Cuts, removes_heads


class WidthCost:
    """Counts channels, MACs and parameters by formula, and measures the latency of a model of those widths.

    Args:
        unet: The dense model.
        groups: Its groups.
        heads: prune.heads.
        latency_repeats: Timed passes per latency.
        clock: Measures latencies, and has measured the dense one of the target; None makes one for `unet`.
    """

    def __init__(
        self,
        unet: Denoiser,
        groups: Sequence[Group],
        *,
        heads: Heads,
        latency_repeats: int,
        clock: SteadyClock | None = None,
    ) -> None:
        self.unet, self.groups, self.heads = unet, groups, heads
        self.clock = clock or SteadyClock(unet, latency_repeats)
        self.layers = weighted_layers(unet)
        self.positions = _count_positions(unet)
        self.shares = [
            (index, member.layer, member.dim, len(member.channels) // group.width)
            for index, group in enumerate(groups)
            for member in group.members
        ]
        uncut = [0] * len(groups)
        self.other_macs = count_macs(unet) - self._layer_macs(uncut)
        self.other_params = count_params(unet) - self._layer_params(uncut)

    @functools.cached_property
    def skeleton(self) -> Denoiser:
        """The dense model without weights, of which candidates are made."""
        return skeleton(self.unet)

    def channels(self, cuts: Cuts) -> float:
        """Count the remaining channels of all groups."""
        return sum(group.width - cut for group, cut in zip(self.groups, cuts, strict=True))

    def macs(self, cuts: Cuts) -> float:
        """Count multiply-accumulates per image; equals `count_macs` of the pruned model.

        But for pools and activations that torch-pruning counts, which it leaves at their dense size, some .1 %.
        """
        return self._layer_macs(cuts) + self.other_macs

    def params(self, cuts: Cuts) -> float:
        """Count parameters; equals `count_params` of the pruned model."""
        return self._layer_params(cuts) + self.other_params

    def latency_ms(self, cuts: Cuts) -> float:
        """Measure the median latency of a forward pass of one image on this device, in milliseconds."""
        return self.clock.measure_ms(self._candidate(cuts))

    def _candidate(self, cuts: Cuts) -> Denoiser:
        """Build a model of these widths from the leading channels of the dense layers, which have realistic values."""
        changed = {name: width for name, width in self.widths(cuts).items() if width != self._dense_width(name)}
        bare = copy.deepcopy(self.skeleton)
        unet = family_of(bare).narrow(bare, changed, self.num_heads(cuts))
        dense = self.unet.state_dict()
        shapes = {name: tensor.shape for name, tensor in unet.state_dict().items()}
        leading = {name: dense[name][tuple(slice(size) for size in shape)].clone() for name, shape in shapes.items()}
        unet.load_state_dict(leading, assign=True)
        for name, buffer in self.unet.named_buffers():  # some are in no weights file
            parent, _, own = name.rpartition(".")
            setattr(unet.get_submodule(parent), own, buffer)
        return unet

    def widths(self, cuts: Cuts) -> dict[str, tuple[int, ...]]:
        """Compute every layer's width: (outputs, inputs), (channels,) for a norm, (rows, columns) for an embedding."""
        remaining = {name: list(self._dense_width(name)) for name in self.layers}
        for group, layer, dim, multiplicity in self.shares:
            remaining[layer][dim] -= multiplicity * cuts[group]
        return {name: tuple(width) for name, width in remaining.items()}

    def num_heads(self, cuts: Cuts) -> dict[str, int]:
        """Count the remaining heads of each attention that loses whole heads."""
        return {
            attention: (group.width - cut) * group.blocks // group.width
            for group, cut in zip(self.groups, cuts, strict=True)
            for attention in group.attentions
            if removes_heads(group, self.heads) and cut
        }

    def _dense_width(self, name: str) -> tuple[int, ...]:
        return tuple(self.layers[name].weight.shape[:2])

    def _layer_macs(self, cuts: Cuts) -> int:
        widths = self.widths(cuts)
        return sum(_macs(layer, widths[name], *self.positions.get(name, (0, 0))) for name, layer in self.layers.items())

    def _layer_params(self, cuts: Cuts) -> int:
        widths = self.widths(cuts)
        return sum(_params(layer, widths[name]) for name, layer in self.layers.items())


@once_per_structure
def _count_positions(unet: Denoiser) -> dict[str, tuple[int, int]]:
    """Count the positions that each layer is applied to for one image, and its calls: an own class may repeat them."""
    unet = skeleton(unet)
    positions: dict[str, tuple[int, int]] = {}
    for name, layer in weighted_layers(unet).items():

        def note(layer: nn.Module, _: object, output: torch.Tensor, name: str = name) -> None:
            """Count the positions of a layer's output."""
            before, calls = positions.get(name, (0, 0))
            positions[name] = before + output.numel() // len(layer.weight), calls + 1  # type: ignore[arg-type]

        layer.register_forward_hook(note)
    forward(unet, example_inputs(unet))
    return positions


def _macs(layer: nn.Module, width: tuple[int, ...], positions: int, calls: int) -> int:
    """MACs by torch-pruning's formula: biases count per position in convolutions, else per call; norms 2 per value."""
    if isinstance(layer, nn.Conv2d):
        kernel = math.prod(layer.kernel_size)
        return positions * width[0] * (kernel * width[1] + (layer.bias is not None))
    if isinstance(layer, nn.Linear):
        return width[0] * (positions * width[1] + calls * (layer.bias is not None))
    return 0 if isinstance(layer, nn.Embedding) else 2 * positions * width[0]


def _params(layer: nn.Module, width: tuple[int, ...]) -> int:
    kernel = math.prod(layer.kernel_size) if isinstance(layer, nn.Conv2d) else 1
    return math.prod(width) * kernel + (width[0] if getattr(layer, "bias", None) is not None else 0)
