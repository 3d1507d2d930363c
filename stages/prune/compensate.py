"""A dense denoiser, its pruned copy and calibration images -> the copy with weights that compensate for cut inputs."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from statistics import fmean

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from stages.data.images import Images
from stages.models.families import Denoiser, prediction
from stages.models.plan import KeptChannels, Plan
from stages.prune.calibration import CalibrationBatches, NoisyBatch
from stages.prune.params import CompensateParams
from stages.runtime.errors import warn
from stages.runtime.progress import track
from stages.storage.tensors import tensors_sha256

Reader = nn.Conv2d | nn.Linear
MIN_SQUARES = 1e-12
"""Lower bound of the mean over channels of a layer's squared inputs, summed over positions, so that the matrix of a
layer with zero inputs is invertible."""
Weigh = Callable[[int], float]
"""Timestep -> weight of its images."""


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's inputs, x in the dense and y in the pruned model; w(t) weighs their timesteps."""

    cross: torch.Tensor
    """[dense inputs, kept inputs]: Σ w(t) x yᵀ."""
    square: torch.Tensor
    """[kept inputs, kept inputs]: Σ w(t) y yᵀ."""


@dataclass(frozen=True)
class Part:
    """Layers that are corrected at once."""

    names: tuple[str, ...]
    calls: int
    """How often a pass calls them in all."""


class _Reached(Exception):  # noqa: N818  # no error
    """The layers of a part have their inputs; the rest of the pass is not needed."""


def weigh_alike(_: int) -> float:
    """w(t) = 1."""
    return 1.0


def compensate(
    dense: Denoiser,
    pruned: Denoiser,
    plan: Plan,
    batches: Iterable[NoisyBatch],
    params: CompensateParams,
    weigh: Weigh = weigh_alike,
) -> None:
    """Correct, in place, the weights of every layer that reads cut channels by least squares on the dense outputs.

    A layer that is not called, for example since an own class uses its weights directly, is named in a warning.

    W' = W_K + (W·E[x yᵀ] − W_K·E[y yᵀ]) · (E[y yᵀ] + λI)⁻¹, where x is a layer's input in the dense model and y in the
    pruned one, over images, positions and timesteps, these with the weights `weigh`; K are the kept inputs, and λ is
    `params.damping` times the mean of the diagonal of E[y yᵀ]. For y = x_K and λ = 0 this is W·C[:, K]·C[K, K]⁻¹ with
    C = E[x xᵀ]; a larger λ keeps W' closer to W_K. All kernel positions of a convolution get the same correction. The
    layers are corrected in the parts of `find_parts`; the activations of a part are those after the parts before it
    were corrected.
    """
    parts = find_parts(dense, plan, next(iter(batches)), params.rounds)
    for part in track(parts, "compensate, part", len(parts)):
        moments = measure_moments(dense, pruned, part.names, batches, weigh, part.calls)
        for name in part.names:
            correct(_layer(dense, name), _layer(pruned, name), plan.layers[name], moments[name], params.damping)


@torch.no_grad()
def difference(dense: Denoiser, pruned: Denoiser, batches: Iterable[NoisyBatch], weigh: Weigh = weigh_alike) -> float:
    """Compute the mean square difference of the predictions of two models, with a weight for each timestep.

    Every image of a timestep counts alike, also those of a short last batch.
    """
    found = []
    for batch in batches:
        predicted, wanted = (prediction(unet(*batch).sample, unet) for unet in (pruned, dense))
        found.append((float((wanted - predicted).square().mean()), len(wanted) * weigh(_timestep(batch))))
    return fmean(*zip(*found, strict=True))


def find_readers(unet: Denoiser, plan: Plan) -> list[str]:
    """List the layers of the dense model that read cut channels."""
    return [
        name
        for name, kept in plan.layers.items()
        if isinstance(layer := unet.get_submodule(name), Reader)
        and kept.inputs is not None
        and len(kept.inputs) < layer.weight.shape[1]
    ]


def find_parts(unet: Denoiser, plan: Plan, batch: NoisyBatch, rounds: int | None) -> list[Part]:
    """Divide the layers that read cut channels into parts, at most `rounds`, in order of execution.

    Layers with equal inputs, such as queries, keys and values, or the projections of the time embedding, do not see
    each other's corrections and are in one part; without `rounds` no others are.
    """
    alike: dict[tuple[str, ...], list[str]] = {}
    inputs = execution_order(unet, plan, batch)
    if unseen := [name for name in find_readers(unet, plan) if name not in inputs]:
        warn(f"not compensated, since the model does not call them: {', '.join(unseen)}")
    for name, hashes in inputs.items():
        alike.setdefault(tuple(hashes), []).append(name)
    groups = list(alike.values())
    size = max(math.ceil(len(groups) / rounds), 1) if rounds else 1
    found = [tuple(chain.from_iterable(groups[start : start + size])) for start in range(0, len(groups), size)]
    return [Part(names, sum(len(inputs[name]) for name in names)) for names in found]


@torch.no_grad()
def execution_order(unet: Denoiser, plan: Plan, batch: NoisyBatch) -> dict[str, list[str]]:
    """List the layers that read cut channels, in order of execution: name -> hash of its inputs at each call."""
    inputs: dict[str, list[str]] = {}

    def add(name: str, value: torch.Tensor) -> None:
        """Add the hash of a layer's inputs."""
        inputs.setdefault(name, []).append(tensors_sha256({"inputs": value}))

    with _reading(unet, find_readers(unet, plan), add) as run:
        run(batch)
    return inputs


@torch.no_grad()
def measure_moments(
    dense: Denoiser,
    pruned: Denoiser,
    names: Sequence[str],
    batches: Iterable[NoisyBatch],
    weigh: Weigh = weigh_alike,
    calls: int = 0,
) -> dict[str, Moments]:
    """Sum w(t) x yᵀ and w(t) y yᵀ over the inputs of each layer, in float64; a pass ends after this many calls of them.

    Without `calls` it goes on to its end.
    """
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    moments: dict[str, Moments] = {}
    weight = 1.0

    def store(name: str, value: torch.Tensor) -> None:
        """Keep a layer's inputs in the dense model until `add` gets those in the cut one."""
        inputs[name].append(_rows(_layer(dense, name), value))

    def add(name: str, value: torch.Tensor) -> None:
        """Add a layer's products of both inputs to its moments."""
        rows = _rows(_layer(pruned, name), value)
        cross, square = weight * (inputs[name].pop(0).T @ rows), weight * (rows.T @ rows)
        before = moments.get(name)
        moments[name] = Moments(before.cross + cross, before.square + square) if before else Moments(cross, square)

    with _reading(dense, names, store, calls) as run_dense, _reading(pruned, names, add, calls) as run_pruned:
        for batch in batches:
            weight = weigh(_timestep(batch))
            run_dense(batch)
            run_pruned(batch)
    return moments


def _timestep(batch: NoisyBatch) -> int:
    return int(batch[1][0])


def _layer(unet: Denoiser, name: str) -> Reader:
    layer = unet.get_submodule(name)
    assert isinstance(layer, Reader)
    return layer


def _rows(layer: Reader, inputs: torch.Tensor) -> torch.Tensor:
    rows = inputs.movedim(1, -1) if isinstance(layer, nn.Conv2d) else inputs  # [N, C, H, W], else [..., C]
    return rows.reshape(-1, rows.shape[-1]).double()


@contextmanager
def _reading(
    unet: Denoiser, names: Iterable[str], read: Callable[[str, torch.Tensor], None], calls: int = 0
) -> Iterator[Callable[[NoisyBatch], None]]:
    """Give each layer's inputs to a function; yields one that passes a batch on, up to so many calls if not 0."""
    left = 0

    def hook(name: str, value: torch.Tensor) -> None:
        """Pass a layer's inputs on, and end the pass at the last call."""
        nonlocal left
        read(name, value)
        left -= 1
        if left == 0:
            raise _Reached

    def run(batch: NoisyBatch) -> None:
        """Pass a batch through the model, as far as needed."""
        nonlocal left
        left = calls
        with suppress(_Reached):
            unet(*batch)

    hooks = [
        _layer(unet, name).register_forward_pre_hook(lambda _, values, name=name: hook(name, values[0]))
        for name in names
    ]
    try:
        yield run
    finally:
        for it in hooks:
            it.remove()


@torch.no_grad()
def correct(dense: Reader, pruned: Reader, kept: KeptChannels, moments: Moments, damping: float) -> None:
    """Correct the weight of one layer, in place, by the equation of `compensate`."""
    square, cross = moments.square, moments.cross
    outputs = range(len(dense.weight)) if kept.outputs is None else kept.outputs
    weight = dense.weight[list(outputs)].double()
    before = weight[:, kept.inputs]
    gap = torch.einsum("oi...,ij->oj...", weight, cross) - torch.einsum("oi...,ij->oj...", before, square)
    ridge = damping * square.diagonal().mean().clamp_min(MIN_SQUARES)
    inverse = torch.linalg.inv(square + ridge * torch.eye(len(square), dtype=square.dtype, device=square.device))
    pruned.weight.copy_(before + torch.einsum("oi...,ij->oj...", gap, inverse))


class NoisyBatches(CalibrationBatches):
    """The calibration images of the compensation.

    Raises:
        InputError: There are fewer than `params.num_images` training images.
    """

    def __init__(
        self,
        unet: Denoiser,
        scheduler: DDPMScheduler,
        images: Images,
        params: CompensateParams,
        seed: int,
    ) -> None:
        purpose, key = "compensation", "prune.compensate"
        super().__init__(unet, scheduler, images, params, seed, purpose=purpose, key=key)
        self.held_out = CalibrationBatches(
            unet, scheduler, images, params, seed, purpose=purpose, key=key, held_out=True
        )
        self.params = params

    def weigh(self, timestep: int) -> float:
        """w(t) = early_weight^(t / last): sampling begins at the last timestep, whose weight is early_weight."""
        return float(self.params.early_weight ** (timestep / max(self.last, 1)))
