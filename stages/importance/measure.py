"""A UNet, images and noise -> the saliency of every weight."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from stages.importance.criteria import CRITERIA, FORMULAS, Layer
from stages.models.families import Condition, Denoiser
from stages.models.params import CriterionName, FormulaName
from stages.models.saliency import Importance
from stages.runtime.progress import track
from stages.storage.tensors import tensors_sha256


@dataclass(frozen=True)
class Draw:
    """One calibration batch under one noise tensor."""

    images: torch.Tensor
    """[B, C, H, W] in [-1, 1]."""
    noise: torch.Tensor
    """Of that shape; it serves all timesteps."""
    condition: Condition = field(default_factory=dict)
    """What a conditional model takes beside them, each [B, …]."""


def measure_importance(
    unet: Denoiser,
    scheduler: DDPMScheduler,
    draws: Iterable[Draw],
    timesteps: Sequence[int],
    *,
    criterion: CriterionName,
    formula: FormulaName,
    threshold: float = 0.0,
    timesteps_per_pass: int = 1,
    precision: Literal["float32", "bfloat16"] = "float32",
    label: str | None = "importance",
) -> Importance:
    """Score every weight of a UNet as Diff-Pruning does (Fang et al., 2023, algorithm 1).

    Args:
        unet: The dense model; its weights stay as they are, its gradients are used up.
        scheduler: The noise schedule that it was trained with.
        draws: Calibration batches with their noise, taken one after the other; the mean over them is what counts, and
            each ends its own sum over the timesteps.
        timesteps: Ascending, as the original takes them.
        criterion: See `CRITERIA`.
        formula: paper or diffusers, see `FORMULAS`.
        threshold: T, of criteria that stop.
        timesteps_per_pass: How many timesteps share a pass; the same ones count, whatever it is. 1 computes bit for bit
            as the original does, more to float32 accuracy (relative error about 1e-6), and faster.
        precision: bfloat16 computes under autocast.
        label: What the progress is called; None shows none.

    Returns:
        The saliencies on the CPU, and for each draw the losses of the timesteps that counted.
    """
    kind = CRITERIA[criterion]
    measure = _Measure(unet, scheduler, criterion, formula, threshold, precision)
    num_each = 1 if kind.each_timestep else timesteps_per_pass
    with _prepared(unet, channels_last=num_each > 1):
        losses = [measure.add(draw, timesteps, num_each, label) for draw in draws] if kind.gradients else []
        saliency = measure.saliency(max(1, len(losses)))
    return Importance(
        criterion=criterion,
        formula=formula,
        precision=precision,
        model_sha256=tensors_sha256(unet.state_dict()),
        counts_doubled=FORMULAS[formula].counts_doubled,
        timesteps=list(timesteps) if kind.gradients else [],
        losses=losses,
        saliency=saliency,
    )


@contextmanager
def _prepared(unet: Denoiser, *, channels_last: bool) -> Iterator[None]:
    """Ask for the gradients of weights only, and lay them out as large passes of convolutions read them fastest."""
    unet.eval().zero_grad(set_to_none=True)
    wanted = {parameter: parameter.requires_grad for parameter in unet.parameters()}
    weights = {layer.weight for layer in unet.modules() if isinstance(layer, Layer)}
    try:
        for parameter in wanted:
            parameter.requires_grad_(parameter in weights)
        if channels_last:
            nn.Module.to(unet, memory_format=torch.channels_last)
        yield
    finally:
        nn.Module.to(unet, memory_format=torch.contiguous_format)
        for parameter, before in wanted.items():
            parameter.requires_grad_(before)
        unet.zero_grad(set_to_none=True)


class _Measure:
    """Adds up the gradients of draw after draw, in memory that does not grow with them."""

    def __init__(
        self,
        unet: Denoiser,
        scheduler: DDPMScheduler,
        criterion: CriterionName,
        formula: FormulaName,
        threshold: float,
        precision: str,
    ) -> None:
        self.unet, self.scheduler, self.precision = unet, scheduler, precision
        self.criterion, self.formula = CRITERIA[criterion], FORMULAS[formula]
        self.score = self.criterion.saliency[formula]
        self.threshold = threshold if self.criterion.stops else 0.0
        self.weights = self.criterion.weights(scheduler.alphas_cumprod)
        self.layers: dict[str, Layer] = {
            name: layer for name, layer in unet.named_modules() if isinstance(layer, Layer)
        }
        self.totals: dict[str, torch.Tensor] = {}

    def add(self, draw: Draw, timesteps: Sequence[int], num_each: int, label: str | None) -> list[float]:
        """Sum over the timesteps until L_t < threshold · max L; return the losses that went in.

        This is the original's prefix rule: the first timestep below the threshold ends the sum, so the paper's set
        {t : L_t / L_max > T} results only while the loss falls with t. Timesteps of one pass that come after the end
        get no weight in its backward pass.
        """
        used: list[float] = []
        largest = 0.0
        starts = range(0, len(timesteps), num_each)
        for start in track(starts, f"{label}, pass", len(starts)) if label else starts:
            chunk = timesteps[start : start + num_each]
            losses = self.forward(draw, chunk)
            values = [loss.item() for loss in losses]
            num_used, largest, ended = self._count(values, largest)
            if num_used:
                weights = [float(self.weights[timestep]) for timestep in chunk[:num_used]]
                sum(weight * loss for weight, loss in zip(weights, losses, strict=False)).backward()  # type: ignore[union-attr]
            if self.criterion.each_timestep:
                self._fold()
            used += values[:num_used]
            if ended:
                break
        return used

    def _count(self, losses: Sequence[float], largest: float) -> tuple[int, float, bool]:
        """How many of these losses count, the largest so far, and whether the sum ends here."""
        for index, loss in enumerate(losses):
            largest = max(largest, loss)
            if loss < self.threshold * largest:
                return index + self.formula.keeps_last, largest, True
        return len(losses), largest, False

    def forward(self, draw: Draw, timesteps: Sequence[int]) -> list[torch.Tensor]:
        """Compute L_t of each timestep in one pass."""
        batch_size, num_each = len(draw.images), len(timesteps)
        moments = torch.tensor(timesteps, device=draw.images.device).repeat_interleave(batch_size)
        images, noise = (tensor.repeat(num_each, 1, 1, 1) for tensor in (draw.images, draw.noise))
        condition = {name: value.repeat(num_each, *[1] * (value.ndim - 1)) for name, value in draw.condition.items()}
        noisy = self.scheduler.add_noise(images, noise, moments)  # type: ignore[arg-type]  # any integers will do
        with self._autocast(draw.images.device.type):
            predicted = self.unet(noisy, moments, **condition).sample
        errors = (predicted.float() - noise).square()
        return [self.formula.loss(part) for part in errors.split(batch_size)]

    def _autocast(self, device_type: str) -> AbstractContextManager[object]:
        return torch.autocast(device_type, torch.bfloat16) if self.precision == "bfloat16" else nullcontext()

    @torch.no_grad()
    def _fold(self) -> None:
        """Add the saliencies of this timestep's gradients to the totals, and forget the gradients."""
        for name, layer in self.layers.items():
            value = self.score(layer, _gradient(layer))
            if value is not None:
                self.totals[name] = self.totals[name].add_(value) if name in self.totals else value
        self.unet.zero_grad(set_to_none=True)

    @torch.no_grad()
    def saliency(self, num_draws: int) -> dict[str, torch.Tensor]:
        """Give the saliency of every layer that has a say, for the mean over the draws."""
        if self.criterion.each_timestep:
            values = {name: total / num_draws for name, total in self.totals.items()}
        else:
            scored = {name: self.score(layer, _gradient(layer) / num_draws) for name, layer in self.layers.items()}
            values = {name: value for name, value in scored.items() if value is not None}
        return {name: value.cpu() for name, value in values.items()}


def _gradient(layer: Layer) -> torch.Tensor:
    gradient = layer.weight.grad
    return torch.zeros_like(layer.weight) if gradient is None else gradient
